"""The background half of a batch: the bytes of the inline way, in order, in bounded memory; CUDA's order."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import weakref
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from acs_fast import InputError, images, output, writer
from acs_fast.images import Images
from acs_fast.manifest import Manifest, read_rows
from acs_fast.output import Output
from acs_fast.writer import read_tensors, write_atomic
from tests.output_runs import (
    CPU,
    Gate,
    bad,
    decode,
    inline_png,
    make,
    path_of,
    put,
    rows_of,
    samples_of,
    scores_of,
    to_uint8,
    whole_files,
    write_inline,
)
from tests.runs import contents

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    return whole_files(tmp_path)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("channels", "decoder"), [(1, None), (3, None), (4, decode)])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("settings", [{}, {"workers": 1, "depth": 1}, {"workers": 4, "depth": 3}], ids=str)
def test_bytes_are_those_of_the_inline_way(tmp_path, device, channels, decoder, scored, settings) -> None:
    batches = [samples_of(i, n, channels) for i, n in enumerate((3, 3, 1))]
    write_inline(tmp_path / "inline", batches, decoder, scored)
    with make(tmp_path / "run", decoder, torch.device(device), **settings) as o:
        for number, samples in enumerate(batches):
            put(o, number, samples.to(memory_format=torch.channels_last), scored)
    assert contents(tmp_path / "run") == contents(tmp_path / "inline")
    assert len(contents(tmp_path / "run")) == 7 + 3 + 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_encoded_pixels_are_the_bytes_that_went_in(channels: int, mode: str) -> None:
    image = torch.randint(0, 256, (5, 9, channels), dtype=torch.uint8)
    encoded = Images(Path("run")).encode(image)
    assert encoded == inline_png(image.permute(2, 0, 1))
    with Image.open(io.BytesIO(encoded)) as read:
        assert read.mode == mode and read.size == (9, 5) and read.tobytes() == bytes(image.flatten().tolist())


def test_order_is_that_of_submission_however_long_an_image_takes(tmp_path, monkeypatch, whole) -> None:
    delays, real = iter([0.3, 0.0, 0.1, *[0.0] * 9]), Images.encode
    written: list[str] = []

    def slow(self: Images, image: Tensor) -> bytes:
        time.sleep(next(delays))
        return real(self, image)

    def listed(path: Path, data: bytes) -> None:
        written.append(f"{path.parent.name}/{path.name}")
        write_atomic(path, data)

    monkeypatch.setattr(Images, "encode", slow)
    monkeypatch.setattr(writer, "write_atomic", listed)
    monkeypatch.setattr(images, "write_atomic", listed)
    with make(tmp_path / "run", workers=3, depth=4) as o:
        for number in range(4):
            put(o, number)
    assert contents(tmp_path / "run") == whole
    for i in range(4):  # a batch after the other: its samples, then its images, in any order
        first, *others = written[4 * i : 4 * i + 4]
        assert first == f"samples/2-{i}.safetensors" and sorted(others) == [
            f"c{row}/{i}.png" for row in range(3)
        ]


def test_images_of_a_batch_are_encoded_at_once(tmp_path, monkeypatch) -> None:
    barrier = threading.Barrier(2, timeout=20)  # passed by two threads together, or broken
    real = Images.encode
    monkeypatch.setattr(Images, "encode", lambda self, image: (barrier.wait(), real(self, image))[1])
    with make(tmp_path / "run", workers=2) as o:
        put(o, 0, samples_of(0, 4))
    assert len(read_rows(o.manifest.out)) == 4


def test_images_of_a_batch_are_written_at_once(tmp_path, monkeypatch) -> None:
    barrier = threading.Barrier(4, timeout=20)
    monkeypatch.setattr(images, "write_atomic", lambda path, data: (barrier.wait(), write_atomic(path, data)))
    with make(tmp_path / "run") as o:
        put(o, 0, samples_of(0, 4))
    assert len(read_rows(o.manifest.out)) == 4


def test_nothing_is_written_after_an_error_of_a_batch_is_told(tmp_path, monkeypatch) -> None:
    def failing(path: Path, data: bytes) -> None:
        if path.parent.name == "c0":
            raise OSError(28, "No space left on device")
        time.sleep(0.2)
        write_atomic(path, data)

    monkeypatch.setattr(images, "write_atomic", failing)
    with pytest.raises(OSError, match="No space left"), make(tmp_path / "run") as o:
        put(o, 0)
        wait(o._in_flight)
        kept = contents(tmp_path / "run")
        time.sleep(0.4)
        assert contents(tmp_path / "run") == kept and not read_rows(o.manifest.out)


def test_decoding_takes_no_gradient(tmp_path) -> None:
    weight, modes = torch.ones(1, requires_grad=True), []

    def decoder(latents: Tensor) -> Tensor:
        modes.append((latents[:, :3] * weight).requires_grad)
        return latents[:, :3] * weight

    with make(tmp_path / "run", decoder) as o:
        put(o, 0)
    assert modes == [False]


def test_a_slow_disk_blocks_submit_at_the_depth_and_is_counted(tmp_path, monkeypatch, whole) -> None:
    gate = Gate(monkeypatch)
    with make(tmp_path / "run", depth=2) as o:
        put(o, 0)
        put(o, 1)
        assert o.waited == 0.0 and not gate.opened.is_set()  # neither has blocked
        decoded = []
        o.decode = lambda latents: (decoded.append(gate.opened.is_set()), decode(latents))[1]
        monkeypatch.setattr(output, "wait", lambda futures: (gate.open_later(), wait(futures)))
        put(o, 2)
        assert decoded == [True]  # no third batch is decoded while two are in flight
        assert 0.2 <= o.waited < 10
        put(o, 3)
    assert contents(tmp_path / "run") == whole


def test_a_disk_that_keeps_up_costs_nothing(tmp_path) -> None:
    with make(tmp_path / "run") as o:
        for number in range(4):
            put(o, number)
            o.flush()
    assert o.waited == 0.0


def test_flush_waits_until_all_is_on_disk(tmp_path, monkeypatch, whole) -> None:
    gate = Gate(monkeypatch)
    with make(tmp_path / "run", depth=4) as o:
        for number in range(4):
            put(o, number)
        assert gate.reached.wait(20) and contents(tmp_path / "run") == {}
        gate.open_later()
        o.flush()
        assert contents(tmp_path / "run") == whole
        assert o.waited == 0.0  # submit did not block


def test_a_clean_exit_flushes(tmp_path, monkeypatch, whole) -> None:
    gate = Gate(monkeypatch)
    with make(tmp_path / "run", depth=4) as o:
        for number in range(4):
            put(o, number)
        gate.open_later()
    assert contents(tmp_path / "run") == whole
    assert not any(thread.name.startswith(("write", "encode", "file")) for thread in threading.enumerate())


def test_memory_is_bounded_by_the_depth(tmp_path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def decoder(latents: Tensor) -> Tensor:
        alive.add(latents)
        return decode(latents)

    def op(images: Tensor) -> Tensor:
        encoded = to_uint8(images)
        alive.add(images)
        alive.add(encoded)
        return encoded

    most = 0
    (tmp_path / "run").mkdir()
    with Output(Manifest(tmp_path / "run"), CPU, decoder, op, depth=2) as o:
        for number in range(50):
            put(o, number)
            most = max(most, len(alive))
        o.flush()
        deadline = time.monotonic() + 10
        while len(alive) and time.monotonic() < deadline:  # the thread lets go of the last one a moment later
            time.sleep(0.01)
        assert len(alive) == 0
    assert len(read_rows(o.manifest.out)) == 150
    assert 0 < most <= 2 * 3  # samples and bytes of two in flight and of one just written


class FakeCuda:
    """CUDA's order of events without CUDA: copies arrive when the event after them is waited for."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.current, self.device = "main", torch.device("cuda", 1)
        for name in ("Stream", "stream", "current_stream", "Event"):
            monkeypatch.setattr(output.torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(output, "to_host", self.to_host)
        monkeypatch.setattr(Tensor, "record_stream", lambda t, s: self.log.append(f"keep {t.dtype}"))

    def Stream(self, device: torch.device) -> FakeCuda:
        return self

    def wait_stream(self, other: str) -> None:
        self.log.append(f"wait for {other}")

    def current_stream(self, device: torch.device) -> str:
        assert device == self.device
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeCuda):
        self.current = "second"
        yield
        self.current = "main"

    def to_host(self, tensor: Tensor) -> Tensor:
        """Junk until the event."""
        self.log.append(f"copy {tensor.dtype} on {self.current}")
        host = torch.ones_like(tensor) if tensor.dtype == torch.bool else torch.full_like(tensor, 77)
        self.copies.append((host, tensor))
        return host

    def Event(self, blocking: bool) -> FakeEvent:
        assert blocking
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda):
        self.cuda, self.copies = cuda, []

    def record(self, stream: FakeCuda) -> None:
        assert stream is self.cuda
        self.cuda.log.append("event")
        self.copies, self.cuda.copies = self.cuda.copies, []

    def synchronize(self) -> None:
        assert threading.current_thread() is not threading.main_thread()
        for host, tensor in self.copies:
            host.copy_(tensor)


def fake(out: Path, monkeypatch, decoder=decode) -> tuple[Output, FakeCuda]:
    cuda = FakeCuda(monkeypatch)
    log = cuda.log

    def logged(latents: Tensor) -> Tensor:
        log.append(f"decode on {cuda.current}")
        return decoder(latents)

    out.mkdir()
    return Output(Manifest(out), cuda.device, logged, to_uint8), cuda


def submit_fake(o: Output, number: int, samples: Tensor, locate=None) -> None:
    path, rows = path_of(o.manifest.out, number), rows_of(number, len(samples))
    o.submit(samples, path, rows, scores_of(number, len(samples)), locate)


def test_on_cuda_a_second_stream_decodes_and_the_thread_waits_for_it(tmp_path, monkeypatch, whole) -> None:
    o, cuda = fake(tmp_path / "run", monkeypatch)
    with o:
        for number in range(4):
            submit_fake(o, number, samples_of(number))
    assert contents(tmp_path / "run") == whole
    types = ("float32", "uint8", "bool", "bool", "float32")  # samples, images, finite, scores
    batch = ["wait for main", "keep torch.float32", "keep torch.bool", "keep torch.float32"]
    batch += ["decode on second", *(f"copy torch.{t} on second" for t in types), "event"]
    assert cuda.log == 4 * batch


def test_on_cuda_finiteness_is_read_after_the_event(tmp_path, monkeypatch) -> None:
    o, _ = fake(tmp_path / "run", monkeypatch)
    with pytest.raises(InputError, match="class c0 index 1 of curriculum 2 is not finite at step 5"), o:
        submit_fake(o, 1, bad(1, 1), lambda: (0, 5))
    assert contents(tmp_path / "run") == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_submit_waits_for_nothing(tmp_path, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    device = torch.device("cuda", torch.cuda.current_device())

    def slow(latents: Tensor) -> Tensor:
        torch.cuda._sleep(2_000_000_000)  # about a second
        return decode(latents)

    gate.opened.set()
    with make(tmp_path / "run", device=device) as o:  # pinned memory and kernels are there afterwards
        put(o, 0)
        o.flush()
        o.decode = slow
        samples = samples_of(1).to(device)
        scores = tuple(values.to(device) for values in scores_of(1, 3))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            started = time.perf_counter()
            o.submit(samples.clone(), path_of(tmp_path / "run", 1), rows_of(1, 3), scores)
            samples.fill_(float("nan"))  # what is submitted is no longer this
            assert time.perf_counter() - started < 0.2
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(read_tensors(path_of(tmp_path / "run", 1))["samples"], samples_of(1))
