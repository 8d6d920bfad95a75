"""Judge a distilled set: train fresh classifiers on it alone, test on real held-out images (PROTOCOLS.md)."""

from __future__ import annotations

from typing import Any

from acs_fast.config import DistillConfig, EvaluateConfig
from acs_fast.data import DIGITS, load_images, select_classes
from acs_fast.evaluation.judging import Evaluation
from acs_fast.evaluation.results import format_results, keep_results
from acs_fast.models.checkpoint import read_config
from acs_fast.networks import checkpoint_path, samples_pixels

__all__ = ["check_test_images", "evaluate", "format_results"]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Train `repeats` fresh classifiers on the images of `config.path` and each baseline; test on real ones.

    `config.path` is a run folder, or a folder of `<class>/<image>` or of WebDataset shards. Returns
    `evaluations`, a record for each protocol and network: for each set the best and last top-1 accuracy of
    every repeat, their mean and their standard deviation (ddof 0), in percent, and what deviates from the
    protocol; with `redundancy` also that. A run folder keeps them in results.json as they are found, beside
    earlier ones of other protocols, and report.html; what single trainings gave is kept too, so that a
    stopped evaluation goes on. What can be refused is refused before anything is trained or sampled.
    """
    evaluation = Evaluation(config)
    evaluation.prepare()
    results: dict[str, Any] = {"evaluations": []}
    for row in evaluation.judge():
        results["evaluations"].append(row)
        if evaluation.run:
            keep_results(evaluation.run.path, {"evaluations": [row]})
    if config.redundancy:
        results["redundancy"] = evaluation.redundancy()
        if evaluation.run:
            keep_results(evaluation.run.path, {"evaluations": [], "redundancy": results["redundancy"]})
    return results


def check_test_images(config: DistillConfig) -> None:
    """InputError before a run whose images could not be judged by the digits, the default of `--real`."""
    if config.real == DIGITS:
        shape = read_config(checkpoint_path(config.model))
        size = shape.input_size if samples_pixels(shape) else None
        channels = shape.in_channels if samples_pixels(shape) else 3
        load_images(DIGITS, "val", select_classes(shape.class_names, config.classes)[0], size, channels)
