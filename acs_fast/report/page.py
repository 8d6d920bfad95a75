"""The page of one run."""

from __future__ import annotations

from pathlib import Path

from acs_fast.report.accuracy import accuracy
from acs_fast.report.folder import read_folder
from acs_fast.report.inventory import manifest, times
from acs_fast.report.markup import document, join, tag
from acs_fast.report.redundancy import redundancy
from acs_fast.report.sections import again, configuration, contact, discriminators, heading
from acs_fast.writer import write_atomic

REPORT = "report.html"
CONTENTS = {
    "accuracy": "Accuracy",
    "redundancy": "Redundancy",
    "discriminators": "Discriminators",
    "images": "Images",
    "time": "Time",
    "manifest": "Manifest",
    "configuration": "Configuration",
    "reproduce": "Reproduce",
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run folder `run`, with all its pictures inside, and return its path.

    out: the file; default report.html in the folder. What the run lacks is said on the page, with the
    command that makes it. The same folder gives the same bytes. InputError for a folder that is no run and
    for damaged results. Takes no lock: a run may be written to meanwhile.
    """
    found, path = read_folder(run), out or run / REPORT
    links = join(tag("li", tag("a", title, href=f"#{name}")) for name, title in CONTENTS.items())
    parts = (accuracy, redundancy, discriminators, contact, times, manifest, configuration, again)
    page = document(
        f"Distilled set {found.name}",
        heading(found),
        tag("nav", tag("ul", links), aria_label="Contents"),
        *(part(found) for part in parts),
    )
    write_atomic(path, page)
    return path
