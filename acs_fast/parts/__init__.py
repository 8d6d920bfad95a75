"""Single parts of ACS for people with a sampler of their own: discriminator, guided step, noise."""

from acs_fast.parts.discriminator import Discriminator
from acs_fast.parts.guided_step import GuidedStep
from acs_fast.parts.noise import philox_normal

__all__ = ["Discriminator", "GuidedStep", "philox_normal"]
