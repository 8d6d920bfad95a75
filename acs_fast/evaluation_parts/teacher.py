"""The teacher of the `soft` protocol (PROTOCOLS.md section 2): from a file, or trained on the real images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.augment import normalize, random_resized_crop, to_device
from acs_fast.config import InputError
from acs_fast.data import ImageSet, imagenet_classes
from acs_fast.models.classifier import build_classifier
from acs_fast.models.weights import list_weights
from acs_fast.writer import write_atomic

STEPS = 1000  # of a teacher that is trained here
BATCH_SIZE = 128
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
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
    name_or_path: str | None,
    network: str,
    classes: Sequence[str],
    real_train: Callable[[], ImageSet],
    device: torch.device,
    seed: int,
    folder: Path | None,
    size: int,
    channels: int = 3,
    steps: int = STEPS,
) -> Teacher:
    """The teacher on `device`: the weights of a file, or else a `network` trained on the real images.

    name_or_path: a state dict (.pth, .pt, .safetensors) of `network` with an output for each of `classes`,
    in their order, or torchvision's IMAGENET1K_V1 weights, whose 1000 outputs are narrowed to `classes` if
    all of them are ImageNet's: its probabilities are then renormalised over the set's classes by the softmax.
    None: trained for `steps` steps on `real_train()`, images [N, channels, size, size], and kept in `folder`
    as `teacher-<network>.safetensors` for another call with the same images, network, seed, size and steps.
    Raises InputError for a file that is missing, unreadable or of another network.
    """
    if name_or_path is not None:
        return _from_file(Path(name_or_path), network, classes, size, channels).to(device)
    real = real_train()
    made_of = {
        "network": network,
        "real_sha256": digest(real),
        "size": str(size),
        "seed": str(seed),
        "steps": str(steps),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier(network, real.images.shape[1], len(real.classes), size)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = folder / f"teacher-{network}.safetensors" if folder else None
    state = _read_cached(path, made_of) if path else None
    if state is None:
        train(model, real, seed, steps)
        if path:
            state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
            write_atomic(path, save(state, made_of))
    else:
        model.load_state_dict(state)
    return Teacher(model, f"{network} trained on {len(real)} real images")


def digest(images: ImageSet) -> str:
    """SHA-256 of the pixels, their shape and labels, the classes' names and whether they may be mirrored."""
    found = hashlib.sha256(repr((tuple(images.images.shape), images.classes, images.mirror)).encode())
    for tensor in (images.images, images.labels):
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def _read_cached(path: Path, made_of: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The weights of a file whose metadata are `made_of`; None for another, a damaged one or none."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != made_of:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of endless batches of BATCH_SIZE: each once, in random order, before any comes again."""
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < BATCH_SIZE:
            rows = torch.cat((rows, torch.randperm(count, generator=generator)))
        yield rows[:BATCH_SIZE]
        rows = rows[BATCH_SIZE:]


def train(model: nn.Module, real: ImageSet, seed: int, steps: int) -> None:
    """Train `model` in place on hard labels: SGD with Nesterov momentum, cosine rate from LR to zero.

    Random resized crops of half to all of the area, flips where the set may be mirrored. InputError for
    weights that are not finite.
    """
    device = next(model.parameters()).device
    images, labels = real.images.to(device), real.labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    batches = _batches(len(labels), generator)
    for _ in tqdm(range(steps), desc="teacher", unit="step", disable=None):
        rows = to_device(next(batches), device)
        batch = random_resized_crop(images[rows].float() / 255.0, real.mirror, generator)
        loss = F.cross_entropy(model(normalize(batch)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise InputError(
            f"the teacher's training on {len(real)} real images did not stay finite; give --teacher FILE"
        )


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


@torch.no_grad()
def describe(teacher: Teacher, test: ImageSet, batch_size: int = 128) -> str:
    """Where the teacher comes from and its top-1 accuracy: `..., 98.2 % on the test images`."""
    device, right = next(teacher.parameters()).device, 0
    for images, labels in zip(test.images.split(batch_size), test.labels.split(batch_size), strict=True):
        logits = teacher(normalize(images.to(device).float() / 255.0))
        right += int((logits.argmax(dim=1).cpu() == labels).sum())
    return f"{teacher.origin}, {100.0 * right / len(test):.1f} % on the test images"
