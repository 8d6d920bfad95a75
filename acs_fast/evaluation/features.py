"""Feature networks by name: classifiers trained on the real images, or timm's and torchvision's models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.augment import normalize
from acs_fast.config import InputError
from acs_fast.data import ImageSet
from acs_fast.evaluation.trained import train_on_real
from acs_fast.models.classifier import build_classifier, default_network

REFERENCE = "reference"  # the name of the default: the classifier that fits the images' size
BATCH = 64  # images whose features are taken at a time
MAX_FEATURES = 4096  # wider feature maps are averaged over their pixels


@dataclass(frozen=True)
class Features:
    """A network that turns images into features, and what results say of it (`describe`).

    network: [B, channels, *size], by `normalize` from [0, 1], to [B, D] or a map [B, D, h, w]; on `device`.
    """

    describe: str
    network: Callable[[Tensor], Tensor]
    channels: int
    size: tuple[int, int]
    normalize: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """The features [N, D], fp32 on the CPU, of images uint8 [N, C, H, W] on any device.

        Images of another size than the network's are resized (bilinear, antialiased); grey is repeated to
        RGB where the network takes that; maps of more than 4096 values are averaged over their pixels.
        Raises InputError for no image, and for RGB images where the network takes grey.
        """
        given = images.shape[1]
        if len(images) == 0:
            raise InputError("there are no images to take features of; give some")
        if given not in (1, self.channels):
            raise InputError(
                f"the images have {given} channels and {self.describe} takes {self.channels}; "
                "give images of that kind, or another feature network"
            )
        return torch.cat([self._of_batch(batch) for batch in images.split(BATCH)])

    def _of_batch(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 255.0
        if tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        found = self.network(self.normalize(x.expand(-1, self.channels, -1, -1)))
        if found.ndim == 4 and found[0].numel() > MAX_FEATURES:
            found = found.mean(dim=(2, 3))
        return found.flatten(1).float().cpu()


def feature_network(
    name: str, real: Callable[[], ImageSet], device: torch.device, seed: int, folder: Path | None
) -> Features:
    """The feature network of a name, on `device`.

    name: `reference` or a classifier of ours (`convnet-4`, `resnet-18`, ..): trained on the real images
    that `real` reads, and kept in `folder` where there is one; `timm:<model>` or `torchvision:<model>`: with
    pretrained weights. Raises InputError for a name that is none of these, a classifier too large for the
    images, a package that is not installed, a model that it lacks or whose weights cannot be had.
    """
    kind, _, model = name.partition(":")
    if kind in PRETRAINED:
        return PRETRAINED[kind](name, model, device)
    images = real()
    check_feature_network(name, images.images.shape[1], len(images.classes), images.images.shape[-1])
    return _classifier(images, device, seed, folder, name)


def check_feature_network(name: str, channels: int, num_classes: int, size: int) -> None:
    """InputError for a name that `feature_network` could not serve for such images, as far as can be seen."""
    kind, colon, _ = name.partition(":")
    if kind in PRETRAINED and colon:
        _package(kind, name)
        return
    if colon or name in PRETRAINED:
        raise InputError(
            f"there is no feature network {name!r}; use {REFERENCE}, a network of ours, timm:<model> or "
            "torchvision:<model>"
        )
    with torch.device("meta"):
        build_classifier(default_network(size) if name == REFERENCE else name, channels, num_classes, size)


# ---- our classifiers, trained on the real images


def _classifier(train: ImageSet, device: torch.device, seed: int, folder: Path | None, name: str) -> Features:
    """What lies before the last layer of a classifier from the folder, or trained now and put there."""
    channels, size = train.images.shape[1], train.images.shape[-1]
    network = default_network(size) if name == REFERENCE else name
    model, describe = train_on_real(network, train, seed, device, folder, REFERENCE)
    features = cast("Callable[[Tensor], Tensor]", model.features)
    return Features(describe, features, channels, (size, size), normalize, device)


# ---- pretrained models of other packages


def _timm(name: str, model: str, device: torch.device) -> Features:
    """A timm model without its classifier; mean, deviation and input size are its pretrained_cfg's."""
    timm = _package("timm", name)
    try:
        network = timm.create_model(model, pretrained=True, num_classes=0)
        config = network.pretrained_cfg
        channels, height, width = config["input_size"]
        scale = _scale(config["mean"], config["std"])
    except Exception as error:  # its own kinds, the hub's and the network's
        _refuse(name, error)
    return _pretrained(name, network, channels, (height, width), scale, device)


def _torchvision(name: str, model: str, device: torch.device) -> Features:
    """A torchvision classifier without its last linear layer; mean, deviation, crop size of its weights."""
    models = _package("torchvision", name).models
    try:
        transforms = models.get_model_weights(model).DEFAULT.transforms()
        size: list[int] = getattr(transforms, "crop_size", [])  # one number: an image classifier's
        if len(size) != 1:
            raise ValueError("it is no classifier of images")
        network = models.get_model(model, weights="DEFAULT")
        _drop_last_linear(network)
        scale = _scale(transforms.mean, transforms.std)
    except Exception as error:  # an unknown name, or weights that cannot be fetched
        _refuse(name, error)
    return _pretrained(name, network, 3, (size[0], size[0]), scale, device)


PRETRAINED: dict[str, Callable[[str, str, torch.device], Features]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}


def _pretrained(
    name: str,
    network: nn.Module,
    channels: int,
    size: tuple[int, int],
    scale: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Features:
    network = network.to(device).eval().requires_grad_(False)
    return Features(f"{name} with its pretrained weights", network, channels, size, scale, device)


def _drop_last_linear(network: nn.Module) -> None:
    """Have the network return what its last linear layer is given; ValueError if it has none."""
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError("it has no linear layer to take the features before")
    parent, _, attribute = found[-1].rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())


def _scale(mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    """(x - mean) / std by channel."""
    shift, factor = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    return lambda x: (x - shift.to(x.device)) / factor.to(x.device)


def _package(package: str, name: str) -> Any:
    """An optional package, imported; InputError if that fails."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            _refuse(name, error)
        raise InputError(
            f"the feature network {name} needs {package}, which is not installed: pip install {package}"
        ) from error
    except Exception as error:  # a torchvision of another torch raises RuntimeError and others
        _refuse(name, error)


def _refuse(name: str, error: Exception) -> NoReturn:
    reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:160].rstrip(": ")
    raise InputError(
        f"the feature network {name} cannot be had ({reason}); check the name, and that its weights are here "
        "or can be fetched"
    ) from error
