"""docs/cluster.md: its commands are ones that there are, and its SLURM script does what the page says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pages import commands, flags

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text()
SCRIPT = re.search(r"```bash\n(.*?)```", PAGE, re.S)
STAND_INS = {  # what the script calls, told what to do by files in its folder
    "srun": 'shift; exec "$@"',
    "torchrun": 'echo "$*" >torchrun.args; echo $$ >torchrun.pid\n'
    'trap "echo TERM >>said; exit 1" TERM; touch started\n'
    "while [ ! -f end ]; do sleep 0.05; done; exit $(cat end)",
    "scontrol": 'if [ "$1" = show ]; then echo node3; echo node4; else echo "$*" >>said; fi',
    "scancel": 'echo "scancel $*" >>said; kill -TERM "$(cat torchrun.pid)"',
}


def test_the_page_names_commands_that_there_are() -> None:
    found = commands(PAGE)  # which tests/test_code_blocks.py has the parsers take
    assert len(found) == 5 and sum(words[0] == "torchrun" for words in found) == 3
    for words in found:
        if "distill" in words:
            assert "wds" in words
    there = flags("distill") | flags("status")
    assert {"--plan", "--deterministic", "--keep-latents", "--log-json", "--verify", "--evaluate"} <= there
    assert "docs/cluster.md" in (ROOT / "README.md").read_text()


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The script in a folder of stand-ins, which it is in the middle of running."""
    assert SCRIPT is not None
    (folder / "job.sh").write_text(SCRIPT[1])
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {
        "JOB_ID": "4711", "JOB_NODELIST": "node[3-4]", "NNODES": "2", "GPUS_ON_NODE": "8",
        "CPUS_PER_TASK": "4",
    }  # fmt: skip
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "SCRATCH": "/scratch"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment)
    until = time.monotonic() + 20
    while not (folder / "started").exists():
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.02)
    return job


def said(folder: Path) -> list[str]:
    return (folder / "said").read_text().splitlines() if (folder / "said").exists() else []


def test_the_slurm_script_stops_the_run_and_queues_it_again(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1
    assert said(tmp_path) == ["scancel --signal=TERM 4711", "TERM", "requeue 4711"]
    words = (tmp_path / "torchrun.args").read_text()
    assert words.startswith("--nnodes 2 --nproc-per-node 8 ") and "--rdzv-endpoint node3:24711 " in words


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_slurm_script_ends_as_the_run_does(code: int, tmp_path: Path) -> None:
    job = start(tmp_path)
    (tmp_path / "end").write_text(str(code))
    assert job.wait(20) == code and said(tmp_path) == []


def test_a_run_that_ends_whole_after_the_signal_is_not_queued_again(tmp_path: Path) -> None:
    job = start(tmp_path)
    (tmp_path / "scancel").write_text("#!/bin/bash\necho 0 >end\n")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0 and said(tmp_path) == []
