"""Edits that break the single parts, each noticed by a few tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

GUIDED, PARTS = "tests/test_guided_step.py", "tests/test_parts.py"

PART_EDITS = [
    Mutation(
        "g is that of the second half of a doubled batch",
        "acs_fast/parts/guided_step.py",
        "_wide(taken.sample[:n])",
        "_wide(taken.sample[-n:])",
        "both_halves",
        GUIDED,
    ),
    Mutation(
        "the push is taken away",
        "acs_fast/parts/guided_step.py",
        "(_wide(latents) + push",
        "(_wide(latents) - push",
        "is_our_sampler and adversarial-sigma-single",
        GUIDED,
    ),
    Mutation(
        "x0 is not clamped where the scheduler clamps it",
        "acs_fast/parts/guided_step.py",
        "if clips(self.scheduler):",
        "if False:",
        "clamped_x0",
        GUIDED,
    ),
    Mutation(
        "the coefficients stay those of the first call",
        "acs_fast/parts/guided_step.py",
        "if timesteps is not self._timesteps:",
        "if self._timesteps is None:",
        "may_have_other_timesteps",
        GUIDED,
    ),
    Mutation(
        "pipelines cannot see what the watched step takes",
        "acs_fast/parts/guided_step.py",
        "@functools.wraps(own)",
        "@(lambda function: function)",
        "step_is_put_back",
        GUIDED,
    ),
    Mutation(
        "a step of the scheduler's own is lost",
        "acs_fast/parts/guided_step.py",
        'attributes.update(step=own) if held else attributes.pop("step", None)',
        'attributes.pop("step", None)',
        "step_is_put_back",
        GUIDED,
    ),
    Mutation(
        "every training starts from the last one's weights",
        "acs_fast/parts/discriminator.py",
        "if warm and self._network is not None",
        "if self._network is not None",
        "same_seed",
        PARTS,
    ),
    Mutation(
        "labels count as positions in their numerical order",
        "acs_fast/parts/discriminator.py",
        "for place, label in enumerate(labels)}",
        "for place, label in enumerate(sorted(labels))}",
        "order_given",
        PARTS,
    ),
    Mutation(
        "latents are cropped",
        "acs_fast/parts/discriminator.py",
        "if self.channels in (1, 3) else",
        "if self.channels in (1, 3, 4) else",
        "shifted_and_pixels",
        PARTS,
    ),
]
