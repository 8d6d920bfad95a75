"""Edits that break what real images do in a run, each noticed by a few tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

FEEDS, GUIDANCE, LOADER = "tests/test_feeds.py", "tests/test_guidance.py", "tests/test_loader.py"

REAL = [
    Mutation(
        "real and sampled images change places",
        "acs_fast/feeds.py",
        "real[len(one.images) :] = 1.0",
        "real[: len(one.images)] = 1.0",
        "equal_numbers or bayes",
        FEEDS,
    ),
    Mutation(
        "the density ratio falls where it must rise",
        "acs_fast/guidance.py",
        "return F.logsigmoid(logits.gather",
        "return F.logsigmoid(-logits.gather",
        "density_ratio",
        GUIDANCE,
    ),
    Mutation(
        "repulsion attracts",
        "acs_fast/guidance.py",
        "g = g - self.gamma * repulsion(",
        "g = g + self.gamma * repulsion(",
        "repulsion_is_subtracted",
        GUIDANCE,
    ),
    Mutation(
        "images shrink without a wider filter",
        "acs_fast/loader/pixels.py",
        "antialias=True",
        "antialias=False",
        "resized_as_pillow",
        LOADER,
    ),
    Mutation(
        "a rank reads another's places",
        "acs_fast/loader/__init__.py",
        "range(number * batch_size + own.start, number * batch_size + own.stop)",
        "range(number * batch_size, number * batch_size + len(own))",
        "ranks_share",
        LOADER,
    ),
    Mutation(
        "the newest curriculum is the oldest",
        "acs_fast/judge.py",
        "summary(right[len(labels) - newest :], loss[len(labels) - newest :])",
        "summary(right[:newest], loss[:newest])",
        "classifiers_record",
        "tests/test_judge.py",
    ),
]
