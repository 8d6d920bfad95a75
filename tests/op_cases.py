"""The shapes and options at which every op is tested: odd batches, latent sizes 8 to 64, 1 to 32 channels."""

from __future__ import annotations

from acs_fast.testing import Case


def grid(op: str, names: str, *rows: tuple[int, ...], **options: object) -> list[Case]:
    """A case per row of sizes, in the order of `names`."""
    return [Case(op, dict(zip(names.split(), row, strict=True)), dict(options)) for row in rows]


DENOISER = [(1, 4, 32), (3, 16, 128), (7, 5, 72), (33, 2, 384), (2, 9, 1152)]
STEP = [(1, 1, 8, 8), (3, 4, 32, 32), (7, 3, 16, 16), (33, 4, 8, 8), (1, 4, 64, 64), (2, 32, 8, 8)]
BLOCK = [
    (1, 1, 4, 64, 8, 8, 64),
    (2, 3, 4, 64, 16, 16, 64),
    (1, 7, 3, 64, 8, 8, 8),
    (1, 1, 64, 64, 16, 16, 64),
    (1, 33, 1, 64, 8, 8, 64),
    (1, 1, 4, 128, 32, 32, 128),
    (1, 1, 4, 64, 64, 64, 64),
    (1, 1, 32, 64, 8, 8, 1),
    (2, 1, 128, 128, 8, 8, 128),
    (1, 3, 64, 64, 2, 2, 64),
]
HEAD = [(1, 64, 10), (3, 128, 2), (7, 256, 100), (33, 64, 10), (2, 96, 1000)]
FUSED = [
    (1, 1, 4, 8, 8, 64, 64),
    (2, 3, 4, 16, 16, 64, 64),
    (1, 7, 3, 8, 8, 64, 8),
    (1, 1, 4, 32, 32, 128, 128),
    (1, 2, 1, 8, 8, 64, 1),
    (1, 1, 32, 8, 8, 64, 64),
]
NORM = [(1, 32, 8, 8, 32), (3, 64, 16, 16, 32), (1, 128, 32, 32, 32), (2, 24, 7, 5, 3)]
OBJECTIVES = ("adversarial", "nonsaturating", "learnability", "density_ratio")
IMAGE, SEQUENCE, FEATURES = "B C H W", "B T D", "B F K"
BLOCKS, FIRST, NETWORK = "N B C_in C H W G", "N B C H W width G", "B C H W width depth G K"

STEP_OPTIONS = [
    {"sampler": sampler, "radius": radius, "learned_range": learned_range, "clip": clip}
    for sampler in ("ddpm", "ddim")
    for radius in ("sigma", "eps")
    for learned_range, clip in ((False, False), (False, True), (True, True))
]
OTHER_STEP = {"sampler": "ddim", "radius": "eps", "learned_range": False, "clip": True}

CASES = [
    *grid("adaln", SEQUENCE, *DENOISER),
    *grid("gated_residual_adaln", SEQUENCE, *DENOISER),
    *grid("philox_normal", IMAGE, *STEP, (2, 1, 5, 7)),
    *grid("pred_xstart", IMAGE, *STEP),
    *grid("pred_xstart", IMAGE, STEP[1], clip=True),
    *grid("guided_step", IMAGE, *STEP),
    *(case for options in STEP_OPTIONS for case in grid("guided_step", IMAGE, STEP[2], **options)),
    *grid("guided_step", IMAGE, STEP[2], gradient=False),
    *grid("conv_norm_act_pool", BLOCKS, *BLOCK),
    *grid("conv_norm_act_pool", BLOCKS, BLOCK[1], activation="silu"),
    *grid("conv_norm_act_pool", BLOCKS, BLOCK[1], shared=True),
    *grid("conv_norm_act_pool_backward_input", BLOCKS, *BLOCK),
    *grid("conv_norm_act_pool_backward_input", BLOCKS, BLOCK[1], activation="silu"),
    *(case for name in OBJECTIVES for case in grid("classifier_head_grad", FEATURES, *HEAD, objective=name)),
    *grid("discriminator_guided_step", FIRST, *FUSED),
    *grid("discriminator_guided_step", FIRST, FUSED[1], activation="silu", **OTHER_STEP),
    *grid("discriminator_guidance", NETWORK, (1, 4, 8, 8, 64, 3, 64, 10), (3, 4, 16, 16, 64, 2, 8, 100)),
    *grid("discriminator_guidance", NETWORK, (2, 4, 8, 8, 64, 2, 64, 10), objective="learnability"),
    *grid(
        "discriminator_guidance",
        NETWORK,
        (2, 1, 16, 16, 64, 4, 64, 2),
        objective="density_ratio",
        activation="silu",
    ),
    *grid("group_norm_silu", "B C H W G", *NORM),
    *grid("to_uint8", IMAGE, *STEP, (3, 3, 17, 9)),
]
