"""What an evaluation refuses, before anything is trained or sampled; each InputError one sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from acs_fast.config import EvaluateConfig, InputError
from acs_fast.data import has_splits, parse_classes
from acs_fast.evaluation.baselines import CORESETS, REAL, REPULSION, SAMPLED
from acs_fast.evaluation.features import check_feature_network
from acs_fast.evaluation.protocols import Recipe
from acs_fast.evaluation.runs import Run
from acs_fast.evaluation.sets import Real, fewest
from acs_fast.evaluation.teacher import load_teacher
from acs_fast.listing import class_folders
from acs_fast.models.checkpoint import digest
from acs_fast.models.classifier import build_classifier
from acs_fast.models.resnet import LAYOUTS
from acs_fast.networks import checkpoint_path

NEIGHBOURS = 5  # k of coverage, density, precision and recall
ONE_PIXEL = 8  # px: a BatchNorm network's last stage is one pixel there

Plans = Sequence[tuple[str, Recipe]]  # networks, each with its recipe


def check_source(config: EvaluateConfig, run: Run | None, source: str) -> None:
    """Refuse real images that are not named, and a baseline that cannot be had honestly."""
    if not source:
        raise InputError(
            f"{config.path} is not a run folder, so name the real images: --real FOLDER or --real digits"
        )
    learns = [f"--baselines {name}" for name in config.baselines if name in REAL]
    learns += ["--redundancy"] if config.redundancy else []
    learns += (
        ["--protocol soft without --teacher"] if "soft" in config.protocol and not config.teacher else []
    )
    if learns and not has_splits(source):
        raise InputError(
            f"{learns[0]}: {source} has no train/ and val/, so what is learned from it would be tested on "
            "the same images; split it or leave that out"
        )
    for name in config.baselines:
        if name in SAMPLED:
            _check_sampled(name, run, config.path)


def _check_sampled(name: str, run: Run | None, path: str) -> None:
    """Refuse where the run's model or classes are not those that it was sampled with."""
    if run is None:
        raise InputError(
            f"{path} is not a run folder, so --baselines {name} cannot be sampled; give the run's"
        )
    if name == REPULSION and run.config.num_curricula == 1:
        raise InputError(
            f"--baselines {name}: a run of one curriculum has no earlier samples to repel; leave {name} out"
        )
    try:
        same = digest(checkpoint_path(run.config.model)) == run.model_sha256
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"--baselines {name}: {run.config.model} is not the model of the run any more; put it back or "
            f"leave {name} out"
        )
    listed = run.classes if run.config.classes is None else parse_classes(run.config.classes)
    named = zip(listed, run.classes, map(str, run.class_labels), strict=False)
    if len(listed) != len(run.classes) or any(text not in names for text, *names in named):
        raise InputError(
            f"--baselines {name}: {run.config.classes} lists other classes than the run has; "
            f"put it back or leave {name} out"
        )


def check_plans(config: EvaluateConfig, plans: Plans, real: Real, ipc: int) -> None:
    """Refuse networks that do not fit, settings that no chosen protocol has, and an unusable teacher."""
    soft = any(recipe.soft for _, recipe in plans)
    if not soft and (config.teacher or config.stored_soft_labels):
        flag = "--teacher" if config.teacher else "--stored-soft-labels"
        raise InputError(f"{flag} is of the soft protocol; add --protocol soft or leave it out")
    for network, recipe in plans:
        with torch.device("meta"):
            build_classifier(network, real.channels, len(real.classes), real.size)
        alone = ipc * len(real.classes) % recipe.batch_size == 1
        if network in LAYOUTS and real.size == ONE_PIXEL and alone:
            raise InputError(
                f"{network} at {ONE_PIXEL} px cannot be trained on a last batch of one image; give another "
                "--ipc or --image-size"
            )
    if soft and config.teacher:
        cpu = torch.device("cpu")
        load_teacher(config.teacher, real.classes, real.sample, cpu, None, real.size, real.channels)


def check_redundancy(config: EvaluateConfig, run: Run | None, real: Real, ipc: int) -> None:
    """Refuse where there are no curricula to compare, or too few images for coverage."""
    if config.redundancy or any(name in CORESETS for name in config.baselines):
        check_feature_network(config.features, real.channels, len(real.classes), real.size)
    elif config.features != "reference":
        raise InputError(
            f"--features {config.features} is of coresets and --redundancy; add one of them or leave it out"
        )
    if not config.redundancy:
        return
    if not run or run.config.num_curricula == 1:
        raise InputError(
            f"--redundancy compares curricula, and {config.path} has not more than one; give a run of several"
        )
    if ipc != run.config.ipc:
        raise InputError(
            f"--redundancy takes all images of a run, so --ipc {ipc} does not go with it; drop it"
        )
    for count, what in (
        (ipc * len(real.classes), "a set"),
        (len(real.train_labels), "the real training set"),
    ):
        if count <= NEIGHBOURS:
            raise InputError(
                f"--redundancy: coverage needs more than {NEIGHBOURS} images, and {what} has {count}; drop it"
            )


def choose_ipc(config: EvaluateConfig, distilled: torch.Tensor, real: Real) -> int:
    """The images a class that every set has; refused where one has fewer than are asked for.

    distilled: the labels of the distilled images, int64 [N].
    """
    available = {"distilled": fewest(distilled, len(real.classes))}
    if any(name in REAL for name in config.baselines):
        available["real training"] = fewest(real.train_labels, len(real.classes))
    ipc = config.ipc or available["distilled"]
    for name, count in available.items():
        if count < ipc:
            raise InputError(f"--ipc {ipc}: a class of the {name} images has only {count}; give at most that")
    return ipc


def tell_of_other_classes(path: str, real: Real) -> None:
    """Say on stderr which classes of the real images a folder without a class list leaves out."""
    root = Path(real.source) / "val"
    known = class_folders(root) if root.is_dir() else []
    if other := [name for name in known if name not in real.classes]:
        named = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
        print(
            f"{path} has {len(real.classes)} of the {len(known)} classes of {real.source}; "
            f"without {named} the task is easier than theirs",
            file=sys.stderr,
        )
