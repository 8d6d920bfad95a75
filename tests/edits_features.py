"""Edits that break coverage, coresets or feature networks, each noticed by a few tests."""

from __future__ import annotations

from tests.edits import Mutation

COVERAGE, CORESETS = "tests/test_coverage.py", "tests/test_coresets.py"
FEATURES, PRETRAINED = "tests/test_features.py", "tests/test_pretrained_features.py"
ROOM = "acs_fast/evaluation"

FEATURE_EDITS = [
    Mutation(
        "a neighbourhood holds its own border",
        f"{ROOM}/coverage.py",
        "inside = distances < real_radii",
        "inside = distances <= real_radii",
        "by_hand or definitions",
        COVERAGE,
    ),
    Mutation(
        "an image is its own nearest neighbour",
        f"{ROOM}/coverage.py",
        "distances.topk(k + 1, ",
        "distances.topk(k, ",
        "by_hand or definitions",
        COVERAGE,
    ),
    Mutation(
        "features off the grid, so that distances are rounded",
        f"{ROOM}/coverage.py",
        " * scale).round_()",
        " * scale)",
        "ties_far or exact",
        COVERAGE,
    ),
    Mutation(
        "herding forgets what it has chosen",
        f"{ROOM}/coresets.py",
        "total += points[chosen[-1]]",
        "total = points[chosen[-1]]",
        "herding or mean",
        CORESETS,
    ),
    Mutation(
        "a centre is chosen again among duplicates",
        f"{ROOM}/coresets.py",
        "distances[chosen] = -1.0",
        "distances[chosen] = 0.0",
        "duplicates or equals",
        CORESETS,
    ),
    Mutation(
        "a reference of other real images is used",
        f"{ROOM}/trained.py",
        '"real_sha256": images_digest(real)',
        '"real_sha256": ""',
        "other_real_images",
        FEATURES,
    ),
    Mutation(
        "the reference is trained at another rate",
        f"{ROOM}/trained.py",
        "LEARNING_RATE, BATCH_SIZE = 1e-3, 64",
        "LEARNING_RATE, BATCH_SIZE = 2e-3, 64",
        "trained_as_stated",
        FEATURES,
    ),
    Mutation(
        "a pretrained model keeps its dropout",
        f"{ROOM}/features.py",
        "network.to(device).eval()",
        "network.to(device)",
        "model and not had",
        PRETRAINED,
    ),
]
