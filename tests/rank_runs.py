"""What the tests of several ranks share: a function called by ranks that are processes, forked in a moment.

A server imports PyTorch once and forks the ranks. They meet through a file and talk by gloo.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 90  # for all that the ranks of a test do
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["acs_fast.curriculum", "tests.rank_runs"])


def _main(
    call: Callable[..., Any], rank: int, num_ranks: int, path: Path, out: Connection, args: Any
) -> None:
    import torch
    import torch.distributed as dist

    from acs_fast.distributed import Ranks

    os.environ["TRITON_INTERPRET"] = "1"  # as in tests/conftest.py
    torch.set_num_threads(1)
    with open(path.with_name(f"{rank}.txt"), "w") as text:  # what it prints, also from below Python
        os.dup2(text.fileno(), 1)
        os.dup2(text.fileno(), 2)
    store = dist.FileStore(str(path), num_ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=SECONDS)
    )
    try:
        result = call(Ranks(rank, num_ranks), *args)
    except BaseException as error:
        result = error
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    out.send_bytes(pickle.dumps(result))  # not `send`, by which tensors share memory
    out.close()


def together(num_ranks: int, call: Callable[..., Any], *args: Any) -> list[Any]:
    """What `call(ranks, *args)`, a function of a module, returns on each rank, or the exception it raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        ranks, answers = [], []
        for rank in range(num_ranks):
            receive, send = FORKS.Pipe(duplex=False)
            job = FORKS.Process(target=_main, args=(call, rank, num_ranks, path, send, args), daemon=True)
            job.start()
            send.close()
            ranks.append(job)
            answers.append(receive)
        try:
            return [_answer(answer, path.with_name(f"{rank}.txt")) for rank, answer in enumerate(answers)]
        finally:
            for job in ranks:
                job.join(5)
                job.kill()


def _answer(answer: Connection, text: Path) -> Any:
    try:
        if answer.poll(SECONDS):
            return pickle.loads(answer.recv_bytes())
    except EOFError:
        pass
    raise AssertionError(f"a rank did not answer; it said: {text.read_text()[-2000:]}")


def agreed(num_ranks: int, call: Callable[..., Any], *args: Any) -> list[Any]:
    """`together`, where no rank may raise."""
    results = together(num_ranks, call, *args)
    for result in results:
        if isinstance(result, BaseException):
            raise AssertionError(f"a rank raised {result!r}")
    return results
