"""Edits that break the pages of runs, each noticed by a few tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import Mutation

PAGES = "tests/test_report.py"

REPORT = [
    Mutation(
        "markup is not escaped",
        "acs_fast/report/markup.py",
        "return value if isinstance(value, Html) else html.escape(str(value))",
        "return str(value)",
        "everything_is_escaped or escaped_once",
        PAGES,
    ),
    Mutation(
        "runs of other epochs share a table",
        "acs_fast/report/results.py",
        'parse_protocol(entry, (int(entry["epochs"]),))',
        'parse_protocol(entry, (int(entry["protocol_epochs"]),))',
        "protocols_never_share",
        PAGES,
    ),
    Mutation(
        "runs judged on other test images share a table",
        "acs_fast/report/comparison.py",
        "groups[found.protocol, found.test_images, run.classes]",
        "groups[found.protocol, 0, run.classes]",
        "protocols_never_share",
        PAGES,
    ),
    Mutation(
        "coverage in other features is compared",
        "acs_fast/report/comparison.py",
        "groups[found.features, found.k, found.real_images, run.classes]",
        "groups[found.k, found.real_images, run.classes]",
        "measured_alike",
        PAGES,
    ),
    Mutation(
        "best and last change places",
        "acs_fast/report/results.py",
        'return score(row["best"]), score(row["last"])',
        'return score(row["last"]), score(row["best"])',
        "accuracies_stand",
        PAGES,
    ),
    Mutation(
        "the date is drawn into the figures",
        "acs_fast/report/figures.py",
        '"svg.hashsalt": "acs-fast",',
        "",
        "same_bytes",
        PAGES,
    ),
    Mutation(
        "the user's matplotlib settings reach the page",
        "acs_fast/report/figures.py",
        'matplotlib.style.context(["default", ours])',
        "matplotlib.style.context([ours])",
        "own_matplotlib",
        PAGES,
    ),
    Mutation(
        "the discriminators' time counts as sampling",
        "acs_fast/report/folder.py",
        "start.discriminators += amount",
        "start.sampling += amount",
        "come_from_the_log",
        PAGES,
    ),
    Mutation(
        "an earlier version's deviations are not said",
        "acs_fast/report/results.py",
        "if epochs[0] != own:",
        "if False:",
        "earlier_version",
        PAGES,
    ),
]
