"""Edits that break the evaluation's networks and the teacher, each noticed by tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

RESNET, TEACHER = "tests/test_resnet.py", "tests/test_teacher.py"
TEACHER_FILE = "acs_fast/evaluation/teacher.py"

NETWORKS = [
    Mutation(
        "the bottleneck strides in its first convolution",
        "acs_fast/models/resnet.py",
        """        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)""",
        """        self.conv1 = conv1x1(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)""",
        "forward_pass and bottleneck and eval",
        RESNET,
    ),
    Mutation(
        "the max pool waits for large images",
        "acs_fast/models/resnet.py",
        "nn.MaxPool2d(3, 2, 1) if size > 64 else",
        "nn.MaxPool2d(3, 2, 1) if large else",
        "every_size and resnet18",
        RESNET,
    ),
    Mutation(
        "convolutions start by their inputs",
        "acs_fast/models/resnet.py",
        'mode="fan_out"',
        'mode="fan_in"',
        "weights_start",
        RESNET,
    ),
    Mutation(
        "ResNetAP strides instead of pooling",
        "acs_fast/models/classifier.py",
        "conv_stride = 1 if pool else stride",
        "conv_stride = stride",
        "published_ones and resnetap or pools_instead",
        "tests/test_classifier.py",
    ),
    Mutation(
        "the teacher's outputs are in ImageNet's order",
        TEACHER_FILE,
        "return [known[name] for name in classes]",
        "return sorted(known[name] for name in classes)",
        "imagenets_outputs",
        TEACHER,
    ),
]
