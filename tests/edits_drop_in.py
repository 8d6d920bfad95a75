"""Edits that break the pipeline, the schedules or the backends, each noticed by a few tests."""

from __future__ import annotations

from tests.edits import Mutation

PIPELINE, SCHEDULERS, BACKENDS, DENOISER = (
    f"tests/test_{name}.py" for name in ("pipeline", "schedulers", "backends", "denoiser")
)

DROP_IN_EDITS = [
    Mutation(
        "DDIM's eps is taken from the clamped x0",
        "acs_fast/schedulers.py",
        "    if not clips(scheduler):\n",
        "    if True:\n",
        "DDIM and True",
        SCHEDULERS,
    ),
    Mutation(
        "the multistep solver's slope has no ratio of the steps",
        "acs_fast/schedulers.py",
        "slope = half * h / before",
        "slope = half",
        "DPMS and 7",
        SCHEDULERS,
    ),
    Mutation(
        "a small number of steps ends by a step of second order",
        "acs_fast/schedulers.py",
        "LOWER_ORDER_BELOW = 15",
        "LOWER_ORDER_BELOW = 5",
        "DPMS and 7",
        SCHEDULERS,
    ),
    Mutation(
        "the engine forgets the x0 of the step before",
        "acs_fast/engine.py",
        "            self.memory.copy_(self.xstart)\n",
        "",
        "error_rule and dpm",
        PIPELINE,
    ),
    Mutation(
        "an image's noise hangs on its place in the batch",
        "acs_fast/pipeline.py",
        "return latents.float(), torch.stack(keys).cpu()",
        "return latents.float(), torch.arange(count)",
        "each_images_own",
        PIPELINE,
    ),
    Mutation(
        "curricula cut the batch, not each class",
        "acs_fast/pipeline.py",
        "for place in parts[number]))",
        "for place in parts[0]))",
        "steer_the_later",
        PIPELINE,
    ),
    Mutation(
        "changed weights are not seen",
        "acs_fast/pipeline.py",
        "(p.data_ptr(), p._version) for p",
        "p.shape for p",
        "changed_weights",
        PIPELINE,
    ),
    Mutation(
        "the pipeline that is given is frozen",
        "acs_fast/models/vae.py",
        "        self.module = module\n",
        "        self.module = module.eval().requires_grad_(False)\n",
        "stays_as_it_is and pipeline",
        PIPELINE,
    ),
    Mutation(
        "the fast gradient leaves the first block out",
        "acs_fast/backends.py",
        "return grad.sum(dim=0)",
        "return grad.sum(dim=0).flip(-1)",
        "guidance_gradient",
        BACKENDS,
    ),
    Mutation(
        "fit does not start from the previous discriminator",
        "acs_fast/backends.py",
        "initial = self._network(seed) if previous is None else previous",
        "initial = self._network(seed)",
        "know_their_images",
        BACKENDS,
    ),
    Mutation(
        "a backend's parameters are not checked",
        "acs_fast/backends.py",
        "        if missing:\n",
        "        if False:\n",
        "found_and_checked and narrow",
        BACKENDS,
    ),
    Mutation(
        "a wheel of xformers without kernels is not told from a shape it does not take",
        "acs_fast/attention.py",
        '"_cpp_library_load_exception"',
        '"_no_such_name"',
        "told_apart",
        DENOISER,
    ),
]
