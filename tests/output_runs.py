"""What the tests of Output share: batches, the inline way to write them, a disk that waits."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from acs_fast import data, writer
from acs_fast.images import Images
from acs_fast.kernels import reference
from acs_fast.manifest import Manifest, read_rows
from acs_fast.output import Output
from acs_fast.writer import write_atomic, write_tensors
from tests.runs import contents

CPU = torch.device("cpu")


def decode(latents: Tensor) -> Tensor:
    """Stands for a VAE: 4 channels to 3, twice the size, channels last; the same numbers on every device."""
    images = latents[:, :3] + latents[:, 3:]
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return images.to(memory_format=torch.channels_last)


def to_uint8(images: Tensor) -> Tensor:
    """The op, as particular as the fast backends."""
    assert images.is_contiguous()
    return reference.to_uint8(images)


def samples_of(number: int, n: int = 3, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(number))


def scores_of(number: int, n: int) -> tuple[Tensor, Tensor]:
    loss = torch.rand(n, generator=torch.Generator().manual_seed(number))
    return loss < 0.5, loss


def rows_of(number: int, n: int) -> list[dict]:
    return [{"class": f"c{i}", "index": number, "curriculum": 2, "seed": 7} for i in range(n)]


def path_of(out: Path, number: int) -> Path:
    return out / "samples" / f"2-{number}.safetensors"


def put(o: Output, number: int, samples: Tensor | None = None, scored: bool = True, locate=None) -> None:
    """Submit batch `number`."""
    samples = samples_of(number) if samples is None else samples
    device = o.stream.device if o.stream else CPU
    scores = tuple(v.to(device) for v in scores_of(number, len(samples))) if scored else None
    rows = rows_of(number, len(samples))
    o.submit(samples.to(device), path_of(o.manifest.out, number), rows, scores, locate)


def make(out: Path, decoder=decode, device: torch.device = CPU, **settings) -> Output:
    out.mkdir(exist_ok=True)
    return Output(Manifest(out), device, decoder, to_uint8, **settings)


def bad(number: int, row: int) -> Tensor:
    samples = samples_of(number)
    samples[row, 2, 5, 5] = float("nan")
    return samples


def inline_png(image: Tensor) -> bytes:
    """uint8 [C, H, W] to PNG, as the package did before there was an Output."""
    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def write_inline(out: Path, batches: list[Tensor], decoder, scored: bool) -> None:
    """The same files, one after another, in this thread."""
    out.mkdir(exist_ok=True)
    manifest = Manifest(out)
    for number, samples in enumerate(batches):
        write_tensors(path_of(out, number), {"samples": samples})
        images = data.to_uint8(samples if decoder is None else decoder(samples))
        right, loss = [None] * len(samples), [None] * len(samples)
        if scored:
            right, loss = (values.tolist() for values in scores_of(number, len(samples)))
        rows = [
            row | {"discriminator_correct": a, "discriminator_loss": b}
            for row, a, b in zip(rows_of(number, len(samples)), right, loss, strict=True)
        ]
        manifest.append([inline_png(image) for image in images], rows)


def holds(out: Path, number: int) -> bool:
    """Whether the images of batch `number` have rows and are the ones written then."""
    rows, images = read_rows(out), Images(out)
    keys = [(f"c{row}", number) for row in range(3)]
    files = [images.read(key) for key in keys]
    return all(
        key in rows and data is not None and hashlib.sha256(data).hexdigest() == rows[key]["sha256"]
        for key, data in zip(keys, files, strict=True)
    )


class Gate:
    """Holds the writing thread at its first file until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        monkeypatch.setattr(writer, "write_atomic", self.write)

    def open_later(self) -> None:
        """In 0.2 s."""
        threading.Timer(0.2, self.opened.set).start()

    def write(self, path: Path, data: bytes) -> None:
        self.reached.set()
        assert self.opened.wait(20)
        write_atomic(path, data)


def whole_files(tmp_path: Path) -> dict[str, bytes]:
    """The files of batches 0 to 3 with nothing in the way."""
    write_inline(tmp_path / "whole", [samples_of(i) for i in range(4)], decode, True)
    return contents(tmp_path / "whole")
