"""What a run is given by its surroundings: the ranks it shares the work with, a log, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from acs_fast.distributed import Ranks
from acs_fast.stopping import Stopped


def _nothing(*_: object, **__: object) -> None:
    """A run that nobody logs or stops."""


@dataclass(frozen=True)
class Session:
    """ranks: this process's place. check: raises where the run is to stop; called between steps and batches.

    event: writes an event, its name and its values, to the rank's log.
    """

    ranks: Ranks = field(default_factory=Ranks)
    check: Callable[[], None] = _nothing
    event: Callable[..., None] = _nothing

    def asked(self) -> Stopped | None:
        """What `check` raises now, if it does."""
        try:
            self.check()
        except Stopped as stopped:
            return stopped
        return None

    def check_together(self) -> None:
        """`check` between steps that ranks share: where one is to stop, all do, after the same step.

        A GPU would else wait for ever for a step's sum that a stopped rank does not send.
        """
        own = self.asked()
        for signum in self.ranks.collect(own.signum if own else None):
            if signum is not None:
                raise Stopped(signum)
