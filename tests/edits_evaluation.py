"""Edits that break the protocols or what they are trained with, each noticed by a few tests."""

from __future__ import annotations

from tests.edits import Mutation

PROTOCOLS, SOFT, ARITHMETIC = "tests/test_protocols.py", "tests/test_soft.py", "tests/test_arithmetic.py"
ROOM = "acs_fast/evaluation"

EVALUATION = [
    Mutation(
        "the second milestone comes late",
        f"{ROOM}/protocols.py",
        "5 * self.epochs // 6",
        "9 * self.epochs // 10",
        "rates_fall",
        PROTOCOLS,
    ),
    Mutation(
        "biases decay in the soft protocol",
        f"{ROOM}/protocols.py",
        '{"params": split[False], "weight_decay": 0.0}',
        '{"params": split[False]}',
        "soft_decays",
        PROTOCOLS,
    ),
    Mutation(
        "the soft loss has the factor T^2",
        f"{ROOM}/training.py",
        'reduction="batchmean", log_target=True)',
        'reduction="batchmean", log_target=True) * TEMPERATURE**2',
        "temperature_20",
        PROTOCOLS,
    ),
    Mutation(
        "CutMix's labels count as if all were kept",
        f"{ROOM}/training.py",
        "loss = kept * F.cross_entropy(logits, own) + (1.0 - kept)",
        "loss = 1.0 * F.cross_entropy(logits, own) + (1.0 - kept)",
        "equals_that_by_hand",
        PROTOCOLS,
    ),
    Mutation(
        "the lighting is left out",
        "acs_fast/augment.py",
        "c = c + (colors[:, 6:] @ known.lighting)[:, :, None]",
        "c = c + 0.0 * (colors[:, 6:] @ known.lighting)[:, :, None]",
        "lighting",
        "tests/test_augment.py",
    ),
    Mutation(
        "rows of patches are swapped as the columns are",
        "acs_fast/augment.py",
        "columns, rows = place[:, 0, None, None, :], place[:, 1, None, :, None]",
        "columns, rows = place[:, 0, None, None, :], place[:, 0, None, :, None]",
        "patches_are_swapped",
        "tests/test_augment.py",
    ),
    Mutation(
        "stored labels of another teacher are used",
        f"{ROOM}/soft.py",
        '"teacher": network_digest(teacher)[:12],',
        '"teacher": "",',
        "identity_differs",
        SOFT,
    ),
    Mutation(
        "a norm's gradient forgets its deviation",
        f"{ROOM}/arithmetic.py",
        "k = -a * rstd * dw / (h * w)",
        "k = -a * 0.0 * dw / (h * w)",
        "finite_differences",
        ARITHMETIC,
    ),
    Mutation(
        "every part counts as a whole batch",
        f"{ROOM}/training.py",
        "logits, share = self.classify(images), len(images) / total",
        "logits, share = self.classify(images), 1.0",
        "parts_and_formats and convnet",
        ARITHMETIC,
    ),
    Mutation(
        "the diagonal counts in cross-increment accuracy",
        f"{ROOM}/redundancy.py",
        "for i in range(n) for j in range(n) if i != j",
        "for i in range(n) for j in range(n)",
        "off_the_diagonal",
        "tests/test_redundancy.py",
    ),
]
