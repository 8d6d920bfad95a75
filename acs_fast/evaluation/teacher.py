"""The teacher of the `soft` protocol (PROTOCOLS.md section 2): from a file, or trained on the real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from acs_fast.config import InputError
from acs_fast.data import ImageSet, imagenet_classes
from acs_fast.evaluation.trained import train_on_real
from acs_fast.models.classifier import build_classifier
from acs_fast.models.weights import list_weights

NETWORK = "resnet18"  # the protocol's
COUNTER = "num_batches_tracked"  # of BatchNorm: torchvision's oldest files lack it


class Teacher(nn.Module):
    """A frozen network in eval mode, and where it comes from: `resnet18 trained on 1297 real images`.

    Normalised images [B, C, S, S] to logits [B, K] in the order of the set's classes.
    """

    def __init__(self, network: nn.Module, origin: str):
        super().__init__()
        self.network, self.origin = network, origin
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def load_teacher(
    path: str | None,
    classes: Sequence[str],
    real: Callable[[], ImageSet],
    device: torch.device,
    folder: Path | None,
    size: int,
    channels: int = 3,
) -> Teacher:
    """The teacher on `device`: the weights of a file, or else a resnet18 trained on the real images.

    path: a state dict (.pth, .pt, .safetensors) of resnet18 with an output for each of `classes`,
    in their order, or torchvision's IMAGENET1K_V1 weights, whose 1000 outputs are narrowed to `classes` if
    all of them are ImageNet's: its probabilities are then renormalised over the set's classes by the softmax.
    None: trained on `real()`, images [N, channels, size, size], and kept in `folder`: see `trained`.
    Raises InputError for a file that is missing, unreadable or of another network.
    """
    if path is not None:
        return _from_file(Path(path), NETWORK, classes, size, channels).to(device)
    return Teacher(*train_on_real(NETWORK, real(), 0, device, folder, "teacher"))


def _from_file(path: Path, network: str, classes: Sequence[str], size: int, channels: int) -> Teacher:
    """The network of a file, on the CPU; see `load_teacher`."""
    if path.suffix not in (".pth", ".pt", ".safetensors") or not path.is_file():
        raise InputError(
            f"--teacher {path} is no file of weights; give a .pth, .pt or .safetensors file of {network}"
        )
    weights, _ = list_weights(path)
    outputs = (weights.shapes.get("fc.weight") or (0,))[0]
    with torch.device("meta"):
        expected = build_classifier(network, channels, max(outputs, 1), size).state_dict()
    _check_shapes(path, network, size, weights.shapes, {n: tuple(v.shape) for n, v in expected.items()})
    rows = _rows(path, outputs, classes)
    state = {name: value.clone() for name, value in weights.read(weights.shapes)}
    if rows is not None:
        state |= {name: state[name][torch.tensor(rows)] for name in ("fc.weight", "fc.bias")}
    model = build_classifier(network, channels, len(classes), size)
    model.load_state_dict(state)
    narrowed = f", narrowed to {len(classes)} of its {outputs} classes" if outputs != len(classes) else ""
    return Teacher(model, f"{network} of {path.name}{narrowed}")


def _check_shapes(
    path: Path,
    network: str,
    size: int,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """InputError for a name that is missing or unknown, and for another shape."""
    problems = [f"it lacks {name}" for name in expected if name not in found and not name.endswith(COUNTER)]
    problems += [f"it also holds {name}" for name in found if name not in expected]
    problems += [
        f"its {name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise InputError(
            f"--teacher {path} does not hold a {network} for images of {size} px ({problems[0]}); give one "
            "of that network, image size and number of channels"
        )


def _rows(path: Path, outputs: int, classes: Sequence[str]) -> list[int] | None:
    """The outputs that are the set's classes; None for all of them as they are."""
    known = {name: row for row, name in enumerate(imagenet_classes())}
    foreign = [name for name in classes if name not in known]
    if outputs == len(known) and not foreign:
        return [known[name] for name in classes]
    if outputs == len(classes):
        return None
    hint = f", and {foreign[0]} is no class of ImageNet" if outputs == len(known) else ""
    raise InputError(
        f"--teacher {path} has {outputs} outputs, the set has {len(classes)} classes{hint}; give a teacher "
        "of these classes, or leave --teacher out to train one"
    )
