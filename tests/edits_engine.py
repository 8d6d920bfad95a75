"""Edits that break the engine around the kernels, each noticed by a few tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

DENOISER, ENGINE_TESTS = "tests/test_denoiser.py", "tests/test_engine.py"
GENERATOR = "tests/test_generator.py"
PLAIN = "plain_model_by_the_error_rule and fp32 and 0-fp32"
TEN_STEPS = "ten_guided_steps and reference and adversarial and sigma"

ENGINE = [
    Mutation(
        "the table mixes gate and shift",
        "acs_fast/denoiser.py",
        "GATE_MSA, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)",
        "SHIFT_MLP, GATE_MSA, SCALE_MLP, GATE_MLP = range(6)",
        "in_float64_it_is_the_plain_model",
        DENOISER,
    ),
    Mutation(
        "the final layer is modulated by the last block's",
        "acs_fast/denoiser.py",
        "after = columns(i + 1,",
        "after = columns(i,",
        "in_float64_it_is_the_plain_model",
        DENOISER,
    ),
    Mutation(
        "the timestep's frequencies ignore their shift",
        "acs_fast/denoiser.py",
        "timestep_features(self.timesteps, embedder.downscale_freq_shift)",
        "timestep_features(self.timesteps, 0)",
        "constants_of_diffusers",
        DENOISER,
    ),
    Mutation(
        "the MLP's norm takes the other epsilon",
        "acs_fast/denoiser.py",
        "residual(y, within, block.eps[1])",
        "residual(y, within, block.eps[0])",
        "constants_of_diffusers",
        DENOISER,
    ),
    Mutation(
        "patches are read column by column",
        "acs_fast/denoiser.py",
        "x.view(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5)",
        "x.view(b, c, g, p, g, p).permute(0, 4, 2, 1, 3, 5)",
        "in_float64_it_is_the_plain_model",
        DENOISER,
    ),
    Mutation(
        "a table is filled in another order than it says",
        "acs_fast/denoiser.py",
        "self._fill(slice(0, len(wanted)), wanted)",
        "self._fill(slice(0, len(wanted)), wanted[::-1])",
        "small_table_is_filled_again",
        DENOISER,
    ),
    Mutation(
        "a packed linear forgets its GELU",
        "acs_fast/linear.py",
        '("gelu", "tanh") if self.gelu else',
        '("none", "") if self.gelu else',
        "packed_where_it_can_be",
        DENOISER,
    ),
    Mutation(
        "the window's first step is not guided",
        "acs_fast/engine.py",
        "return low <= self.coefficients",
        "return low < self.coefficients",
        "window_is_closed",
        ENGINE_TESTS,
    ),
    Mutation(
        "all images take the first one's inputs",
        "acs_fast/engine.py",
        "self.staging[number, :n], self.staging[number, n:] = values, values[-1]",
        "self.staging[number, :n], self.staging[number, n:] = values[0], values[-1]",
        f"({TEN_STEPS})",
        ENGINE_TESTS,
    ),
    Mutation(
        "a second curriculum keeps the first one's weights",
        "acs_fast/engine.py",
        "                static.copy_(new)",
        "                static.copy_(static)",
        "second_guidance_is_copied",
        ENGINE_TESTS,
    ),
    Mutation(
        "autograd's networks keep the first one's weights",
        "acs_fast/engine.py",
        "own.load_state_dict(network.state_dict())",
        "own.load_state_dict(own.state_dict())",
        "second_guidance_is_copied",
        ENGINE_TESTS,
    ),
    Mutation(
        "auto takes bf16 wherever the processor has it",
        "acs_fast/networks.py",
        "if 1.2 * seconds(torch.bfloat16) < seconds(torch.float32)",
        "if 0.0 * seconds(torch.bfloat16) < seconds(torch.float32)",
        "bf16_must_win",
        GENERATOR,
    ),
]
