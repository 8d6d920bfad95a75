"""ACS's adversarial guidance: objectives, trust radii, gradient paths; equations (3) and (4) of METHOD.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.diffusion import NUM_TRAIN_TIMESTEPS, StepCoefficients


def margin(logits: Tensor, class_labels: Tensor) -> Tensor:
    """m = log sum_{k != y} exp(logit_k) - logit_y, so p_y = sigmoid(-m) and 1 - p_y keeps its digits: [B]."""
    others = logits.scatter(1, class_labels[:, None], -math.inf)
    return torch.logsumexp(others, dim=1) - logits.gather(1, class_labels[:, None])[:, 0]


def adversarial(logits: Tensor, class_labels: Tensor) -> Tensor:
    """L = CE(f_i(z), y) = softplus(m) [ours, from the paper's abstract]: [B] from logits [B, K]."""
    return F.softplus(margin(logits, class_labels))


def nonsaturating(logits: Tensor, class_labels: Tensor) -> Tensor:
    """L = log(1 - p_i(y | z)) = -softplus(-m) [CUDD]: [B] from logits [B, K].

    It rises with m as `adversarial` does, so the normalised step (4) has the same direction as there.
    """
    return -F.softplus(-margin(logits, class_labels))


def learnability(logits: Tensor, real_logits: Tensor, class_labels: Tensor, omega: float) -> Tensor:
    """L = CE(f_i(z), y) - omega CE(f_real(z), y) [LGD, arXiv 2604.00519]: fp32 [B]."""
    return adversarial(logits, class_labels) - omega * adversarial(real_logits, class_labels)


def density_ratio(logits: Tensor, class_labels: Tensor) -> Tensor:
    """L = log D(z, y), D = sigmoid(logit_y) "real" against "already sampled" [ours]: [B] of logits [B, K]."""
    return F.logsigmoid(logits.gather(1, class_labels[:, None])[:, 0])


def repulsion(x0: Tensor, earlier: Tensor) -> Tensor:
    """d cos(x0, e) / d x0 = (e - (u e) u) / ||x0||, u = x0 / ||x0||, e the nearest of the earlier samples.

    IGD's diversity term: [B, C, H, W]. x0: [B, C, H, W]. earlier: [B, M, C H W] of each sample's class, of
    length 1, or 0 where there are fewer than M.
    """
    x = x0.flatten(1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    u, earlier = x / length, earlier.to(x.dtype)
    cosine = torch.einsum("bd,bmd->bm", u, earlier)
    absent = torch.linalg.vector_norm(earlier, dim=2) == 0
    best, nearest = cosine.masked_fill(absent, -math.inf).max(dim=1)
    best = best.masked_fill(absent.all(dim=1), 0.0)[:, None]
    e = earlier.gather(1, nearest[:, None, None].expand(-1, 1, x.shape[1]))[:, 0]
    return ((e - best * u) / length).view_as(x0)


@dataclass(frozen=True)
class Guidance:
    """What steers a curriculum: the discriminator f_i, the objective L to ascend, the length of a step."""

    objective: str
    discriminator: nn.Module
    real_classifier: nn.Module | None  # f_real, for `learnability` alone
    omega: float
    scale: float
    trust_radius: str
    window: tuple[float, float]
    jacobian: str
    # what the classifiers see of x0: z = decode(x0), differentiable ([B, C, H, W] to [B, 3, S, S]); None: x0
    decode: Callable[[Tensor], Tensor] | None = None
    decode_batch: int | None = None  # so many samples are decoded and differentiated at a time; None: all
    gamma: float = 0.0  # weight of the repulsion from earlier samples, which it subtracts from (3)
    earlier: Tensor | None = None  # [K, M, C H W], as `repulsion` takes them, by class

    def active(self, c: StepCoefficients) -> bool:
        """w(t): whether t / T lies in the guided window."""
        return self.window[0] <= c.timestep / NUM_TRAIN_TIMESTEPS <= self.window[1]

    def value(self, pred_xstart: Tensor, class_labels: Tensor) -> Tensor:
        """L(z, y) per sample, [B] in fp32 or wider, of predicted clean samples x0 [B, C, H, W]."""
        z = pred_xstart if self.decode is None else self.decode(pred_xstart)
        logits = _logits(self.discriminator, z)
        if self.objective == "learnability":
            assert self.real_classifier is not None
            return learnability(logits, _logits(self.real_classifier, z), class_labels, self.omega)
        of_logits = {"nonsaturating": nonsaturating, "density_ratio": density_ratio}
        return of_logits.get(self.objective, adversarial)(logits, class_labels)

    def direction(self, x: Tensor, pred_xstart: Tensor, class_labels: Tensor, clip: bool = False) -> Tensor:
        """g / ||g|| per sample (4), zero where g is: [B, C, H, W]; arguments as in `gradient`."""
        return unit(self.gradient(x, pred_xstart, class_labels, clip))

    def gradient(self, x: Tensor, pred_xstart: Tensor, class_labels: Tensor, clip: bool = False) -> Tensor:
        """g of (3): [B, C, H, W] in the dtype of x.

        jacobian `identity`: g = dL/dx0 at z = x0 or z = decode(x0); d x0 / d x_t is a factor 1 / sqrt(a_t)
        that the norm removes.
        jacobian `full`: g = dL/dx_t through the denoiser; pred_xstart must be a differentiable function of x.
        clip: x0 is clamped to [-1, 1], and the gradient passes straight through the clamp.
        """
        x0 = pred_xstart.detach()
        x0 = x0.clamp(-1.0, 1.0) if clip else x0
        size = self.decode_batch or len(x0)
        parts = zip(x0.split(size), class_labels.split(size), strict=True)
        g = torch.cat([self._gradient_at(*part) for part in parts])
        if self.gamma and self.earlier is not None:
            g = g - self.gamma * repulsion(x0, self.earlier[class_labels]).to(g.dtype)
        if self.jacobian == "full":
            (g,) = torch.autograd.grad(pred_xstart, x, g)
        return g.to(x.dtype)

    def _gradient_at(self, x0: Tensor, class_labels: Tensor) -> Tensor:
        """dL/dx0 [B, C, H, W]; each value depends on its own sample alone, so one sum gives them all."""
        x0 = x0.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.value(x0, class_labels).sum(), x0)
        return g

    def radius(self, eps: Tensor, c: StepCoefficients) -> Tensor:
        """s_t = scale r_t per sample (4): [B, 1, 1, 1].

        `sigma`: r_t = the step's posterior standard deviation times sqrt(numel) (DDPM's, also with DDIM).
        `eps`: r_t = sqrt(1 - a_t) ||eps||, as IGD and LGD normalise.
        """
        if self.trust_radius == "sigma":
            return torch.full_like(eps[:, :1, :1, :1], self.scale * c.sigma * math.sqrt(eps[0].numel()))
        norm = torch.linalg.vector_norm(eps, dim=(1, 2, 3), keepdim=True)
        return self.scale * math.sqrt(1.0 - c.alpha_cumprod) * norm


def unit(g: Tensor) -> Tensor:
    """g / ||g|| of each sample, zero where g is: [B, C, H, W]."""
    tiny = torch.finfo(g.dtype).tiny
    g = g / g.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)  # the squares must not underflow
    return g / torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True).clamp_min(tiny)


def _logits(network: nn.Module, z: Tensor) -> Tensor:
    """[B, K] by a network in its own dtype, returned in fp32 or wider."""
    logits = network(z.to(next(network.parameters(), z).dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
