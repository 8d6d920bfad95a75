"""What an edit of tests/mutations.py is."""

from __future__ import annotations

from dataclasses import dataclass

OPS, SPECIFICATION, EMULATION = "tests/test_ops.py", "tests/test_reference.py", "tests/test_cuda.py"


@dataclass(frozen=True)
class Mutation:
    """One edit: `old`, which the file holds exactly once, becomes `new`; `tests` are to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    path: str = OPS
