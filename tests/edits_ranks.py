"""Edits that break what ranks share, and what a run that is continued makes anew (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

RANK, LEFT, HEART = "tests/test_ranks.py", "tests/test_left.py", "tests/test_heartbeat.py"
DISTRIBUTED, DISCRIMINATOR = "acs_fast/distributed.py", "acs_fast/discriminator.py"
RESUME, HEARTBEAT = "acs_fast/resume.py", "acs_fast/heartbeat.py"

RANKS = [
    Mutation(
        "shares overlap",
        DISTRIBUTED,
        "range(count * rank // n, count * (rank + 1) // n)",
        "range(count * rank // n, -(-count * (rank + 1) // n))",
        "any_shares or contiguous",
        LEFT,
    ),
    Mutation(
        "an error of rank 0 stays its own",
        DISTRIBUTED,
        "        if result[1] is not None:\n            result[1].told",
        "        if result[1] is not None and self.leads:\n            result[1].told",
        "raised_everywhere",
        RANK,
    ),
    Mutation(
        "every rank says the error of rank 0",
        DISTRIBUTED,
        "result[1].told = not self.leads",
        "result[1].told = False",
        "raised_everywhere",
        RANK,
    ),
    Mutation(
        "padding is taken for rows",
        DISTRIBUTED,
        "piece[:count] for piece, count",
        "piece[: max(counts)] for piece, count",
        "see_the_same",
        RANK,
    ),
    Mutation(
        "gradients are not summed",
        DISCRIMINATOR,
        "ranks.add([*gradients, loss_out])",
        "ranks.add([loss_out])",
        "train_as_one and 7 and classes",
        RANK,
    ),
    Mutation(
        "a part's loss is its own mean",
        DISCRIMINATOR,
        "losses(network(batch), labels, real).sum() / total",
        "losses(network(batch), labels, real).mean()",
        "train_as_one and 7",
        RANK,
    ),
    Mutation(
        "a rank stops while the others train on",
        DISCRIMINATOR,
        "self.session.check_together()",
        "self.session.check()",
        "same_step",
        RANK,
    ),
    Mutation(
        "what a discriminator sees is cut by rank",
        "acs_fast/steering.py",
        "blocks = cut(count, BLOCK)",
        "blocks = cut(count, -(-count // self.ranks.num_ranks))",
        "hangs_on_no_number",
        RANK,
    ),
    Mutation(
        "samples of the curriculum itself are taken as needed",
        RESUME,
        "        needed[curriculum] = keep or later\n",
        "        needed[curriculum] = keep or later or (guided and not is_ready(curriculum))\n",
        "needed_for",
        LEFT,
    ),
    Mutation(
        "samples for a discriminator to be trained are not taken as needed",
        RESUME,
        "later = later or repulsion or not is_ready(curriculum)",
        "later = later or repulsion",
        "needed_for",
        LEFT,
    ),
    Mutation(
        "a damaged image counts as whole",
        RESUME,
        "whole[number] = same",
        "whole[number] = True",
        "other_bytes",
        LEFT,
    ),
    Mutation(
        "where sample files overlap the second overwrites what lies beside it",
        "acs_fast/samples.py",
        "start - part.start, stop - part.start",
        "0, stop - start",
        "overlap",
        LEFT,
    ),
    Mutation(
        "a rank that ended well is taken for dead",
        HEARTBEAT,
        "rank != self.rank and state != ENDED and",
        "rank != self.rank and",
        "ended_well",
        HEART,
    ),
    Mutation(
        "a rank that failed is taken for one that ended well",
        HEARTBEAT,
        "self._last = ENDED if ended_well else self._last",
        "self._last = ENDED",
        "failed_is_missed",
        HEART,
    ),
]
