"""What ACS trains between two curricula, as an object of its own."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from acs_fast.augment import random_resized_crop, shift_and_flip
from acs_fast.config import InputError
from acs_fast.config.fields import check_discriminator
from acs_fast.discriminator import Trainer, score
from acs_fast.feeds import permuted
from acs_fast.guidance import Guidance
from acs_fast.models.classifier import seeded_classifier
from acs_fast.parts.checks import Whole, check_objective, check_real, check_whole, whole_numbers
from acs_fast.writer import write_atomic

METADATA = "acs_fast.discriminator"  # of its files: the arguments it was made with
SHOWN = 8  # labels in a message


class Discriminator:
    """The classifier that guides: learns to tell the classes of what was sampled so far apart.

    network: `convnet-<depth>`, `resnet-18` or `resnetap-10`. class_labels: the model's labels of the classes,
    at least two; the order is that of the logits. channels, size: of a sample. steps, lr, batch_size: of a
    training, by AdamW with a cosine rate. mirror: whether samples may be seen mirrored, as digits must not.
    seed: weights and batches are a function of it and of the samples. InputError for what does not fit.
    """

    def __init__(
        self,
        network: str = "convnet-3",
        *,
        class_labels: Whole,
        channels: int = 4,
        size: int = 32,
        device: str | torch.device = "cpu",
        steps: int = 100,
        lr: float = 3e-3,
        batch_size: int = 64,
        mirror: bool = True,
        seed: int = 0,
    ):
        labels = whole_numbers(class_labels, "class_labels").tolist()
        if len(set(labels)) < max(2, len(labels)):
            raise InputError(f"class_labels are {_shown(labels)}; give at least two, each once")
        for name, value in (("channels", channels), ("size", size), ("steps", steps)):
            check_whole(value, name, 1)
        check_whole(batch_size, "batch_size", 1)
        check_whole(seed, "seed", 0, 2**63 - 1)
        check_real(lr, "lr", zero=False)
        self.class_labels, self.channels, self.size = labels, channels, size
        self.settings: dict[str, Any] = {
            "network": network, "class_labels": labels, "channels": channels, "size": size, "steps": steps,
            "lr": lr, "batch_size": batch_size, "mirror": bool(mirror), "seed": seed,
        }  # fmt: skip
        self._positions = {label: place for place, label in enumerate(labels)}
        self._network: nn.Module | None = None
        self._trainer: Trainer | None = None  # kept: on a GPU its step is captured once
        check_discriminator(network)
        self.device = torch.device(device)
        built = next(self._build().parameters())  # refuses what does not fit
        self.device = built.device  # of a GPU with its number

    @property
    def network(self) -> nn.Module:
        """The trained classifier [n, C, S, S] to logits [n, K], frozen; InputError before `fit`."""
        if self._network is None:
            raise InputError("this Discriminator is untrained; call fit(samples, labels) first")
        return self._network

    def targets(self, labels: Whole) -> Tensor:
        """The positions of labels among `class_labels`, which the logits are in order of: int64 [n], CPU."""
        found = whole_numbers(labels, "labels").tolist()
        for label in found:
            if label not in self._positions:
                known = _shown(self.class_labels)
                raise InputError(f"label {label} is none of the discriminator's, which are {known}")
        return torch.tensor([self._positions[label] for label in found])

    def fit(self, samples: Tensor, labels: Whole, *, warm: bool = False) -> Self:
        """Train on samples [N, C, S, S], of any floating dtype and on any device, and their labels.

        From new weights or, with `warm`, from those of the last training. Latents are seen moved by up to an
        eighth of the edge, images (1 or 3 channels) by random crops. The earlier `network` stays as it is.
        InputError for samples that do not fit, and where the trained weights are not finite.
        """
        samples, targets = self._checked(samples, labels)
        if samples.device.type != "cpu":  # those of the host may be too many for the device
            samples = samples.to(self.device)
        with torch.inference_mode(False), torch.enable_grad():
            state = self._train(samples, targets, warm)
            network = self._build()
            network.load_state_dict(state)
        self._network = network.eval().requires_grad_(False)
        return self

    def _train(self, samples: Tensor, targets: Tensor, warm: bool) -> dict[str, Any]:
        s = self.settings
        initial = self._network if warm and self._network is not None else self._build()
        self._trainer = self._trainer or Trainer(self._build())
        batches = permuted(
            samples, targets, batch_size=s["batch_size"], mirror=s["mirror"], seed=s["seed"],
            device=self.device, augment=random_resized_crop if self.channels in (1, 3) else shift_and_flip,
        )  # fmt: skip
        with closing(batches):
            for _ in self._trainer.learn(initial.state_dict(), batches, steps=s["steps"], lr=s["lr"]):
                pass
        state = self._trainer.network.state_dict()
        if not all(bool(torch.isfinite(values).all()) for values in state.values()):
            raise InputError(f"the trained weights are not finite; lower lr, which is {s['lr']:g}")
        return state

    def accuracy(self, samples: Tensor, labels: Whole) -> float:
        """How many of the samples [N, C, S, S] it judges right, in percent; InputError before `fit`."""
        right, _ = score(self.network, *self._checked(samples, labels))
        return 100.0 * right.double().mean().item()

    def direction(self, pred_xstart: Tensor, labels: Whole, objective: str = "adversarial") -> Tensor:
        """g / ||g|| of each sample, g = dL/dx0 at x0 = pred_xstart: equations (3) and (4) of docs/method.md.

        pred_xstart: [n, C, S, S]; the result has its shape, dtype and device, and is 0 where g is. objective:
        `adversarial`, L = CE(f(x0), y), or `nonsaturating`, L = log(1 - p(y given x0)). InputError before
        `fit`, for samples that do not fit, and for objectives that real images are needed for.
        """
        guidance = self.guidance(objective)
        return self.push(guidance, *self._checked(pred_xstart, labels)).to(pred_xstart)

    def guidance(
        self,
        objective: str = "adversarial",
        scale: float = 1.0,
        trust_radius: str = "sigma",
        window: tuple[float, float] = (0.0, 1.0),
    ) -> Guidance:
        """The guidance by this discriminator, on samples and with the identity for d x0 / d x_t."""
        check_objective(objective)
        return Guidance(objective, self.network, None, 0.0, scale, trust_radius, window, "identity")

    def push(self, guidance: Guidance, pred_xstart: Tensor, targets: Tensor) -> Tensor:
        """`direction` of positions instead of labels, unchecked, in fp32 or wider on this device."""
        with torch.inference_mode(False):
            wide = torch.promote_types(pred_xstart.dtype, torch.float32)
            x0 = pred_xstart.to(self.device, wide).clone()  # inference tensors have no gradient, copies do
            return guidance.direction(x0, x0, targets.to(self.device).clone())

    def save(self, path: str | Path) -> None:
        """Write weights and arguments as a safetensors file; InputError before `fit`."""
        weights = {
            name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()
        }
        write_atomic(Path(path), safetensors.torch.save(weights, {METADATA: json.dumps(self.settings)}))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """What `save` wrote; InputError for a file that is missing, damaged or of something else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                stored = (file.metadata() or {}).get(METADATA)
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise InputError(f"there is no file {path}; Discriminator.save writes one") from error
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged or no safetensors file ({error}); save it again") from error
        if stored is None:
            raise InputError(f"{path} is no file of a Discriminator; load what Discriminator.save wrote")
        try:
            found = cls(**json.loads(stored), device=device)
            network = found._build()
            network.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:  # an InputError is a ValueError
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path} is no whole file of a Discriminator ({reason}); save it again"
            ) from error
        found._network = network.eval().requires_grad_(False)
        return found

    def check_shape(self, shape: torch.Size | tuple[int, ...]) -> None:
        """InputError for samples of another shape [n, C, H, W] than the discriminator's."""
        if len(shape) != 4:
            raise InputError(f"samples have the shape {tuple(shape)}; give [n, channels, height, width]")
        if tuple(shape[1:]) != (self.channels, self.size, self.size):
            edges = f"{shape[2]}" if shape[2] == shape[3] else f"{shape[2]} x {shape[3]}"
            raise InputError(
                f"the discriminator was made for {self.channels} channels of {self.size} px, these samples "
                f"have {shape[1]} of {edges}; make it with the channels and size of what is sampled"
            )

    def _checked(self, samples: Tensor, labels: Whole) -> tuple[Tensor, Tensor]:
        """Samples and the positions of their labels, where they fit; InputError otherwise."""
        if not isinstance(samples, Tensor) or not samples.is_floating_point():
            kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
            raise InputError(f"samples are {kind}; give a tensor of floats [n, channels, height, width]")
        self.check_shape(samples.shape)
        targets = self.targets(labels)
        if len(samples) != len(targets):
            raise InputError(f"there are {len(samples)} samples and {len(targets)} labels; give as many")
        if not bool(torch.isfinite(samples).all()):
            raise InputError("samples hold numbers that are not finite; leave out those that diverged")
        return samples, targets

    def _build(self) -> nn.Module:
        """An untrained network; its weights are a function of the seed."""
        shape = (self.channels, len(self.class_labels), self.size)
        network = seeded_classifier(self.settings["network"], *shape, self.settings["seed"])
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _shown(labels: list[int]) -> str:
    """A few labels for a message."""
    text = ", ".join(map(str, labels[:SHOWN]))
    return text if len(labels) <= SHOWN else f"{text}, ... ({len(labels)} in all)"
