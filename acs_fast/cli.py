"""The command line: every flag is a field of a configuration in config, every command one call."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from acs_fast import __version__
from acs_fast.config import (
    PRESETS,
    BenchConfig,
    DistillConfig,
    EncodeConfig,
    EvaluateConfig,
    InputError,
    TrainConfig,
    resolve,
)
from acs_fast.stopping import RankLost, Stopped, Stopping

COMPARISON = "runs/comparison.html"  # where `report` compares several runs


def main(argv: list[str] | None = None) -> int:
    """Run a command: 0 on success, 1 where `bench` finds wrong results or `status` a run that is not whole.

    2, with one sentence on stderr, for unusable input; 130 when interrupted, 143 when stopped by SIGTERM, 141
    when nobody reads what it prints any more.
    """
    args = make_parser().parse_args(argv)
    again = "run the same command again to continue" if args.call in (run_distill, run_encode) else ""
    try:
        code = args.call(args) or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        if not getattr(error, "told", False):  # by rank 0
            print(f"acs-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"acs-fast: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read what this prints has ended: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 141
    except OSError as error:
        if getattr(error, "told", False):
            return 2
        where = f" {error.filename}" if error.filename else ""
        hint = again and f"; what is written is whole, mend this and {again}"
        print(f"acs-fast: cannot read or write{where}: {error.strerror or error}{hint}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"acs-fast: {stopped}{again and '; ' + again}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(f"acs-fast: interrupted{again and '; ' + again}", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; needs no torch."""
    parser = argparse.ArgumentParser(
        prog="acs-fast", description="Dataset distillation with diffusion models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"acs-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "distill", help="sample a distilled set by adversary-guided curriculum sampling"
    )
    add_fields(command, DistillConfig)
    command.add_argument(
        "--evaluate", action="store_true", help="evaluate the set afterwards and write the report"
    )
    command.add_argument("--baselines", type=_names, default=(), help="with --evaluate: those of evaluate")
    command.add_argument("--overwrite", action="store_true", help="replace a run in the output folder")
    command.add_argument("--plan", action="store_true", help="print what it will take, write nothing")
    command.set_defaults(call=run_distill)

    command = commands.add_parser(
        "evaluate", help="train classifiers on a distilled set, test them on real images"
    )
    command.add_argument(
        "path", metavar="RUN_OR_IMAGE_FOLDER", help="a run folder, or a folder <class>/*.png"
    )
    add_fields(command, EvaluateConfig)
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.set_defaults(call=run_evaluate)

    command = commands.add_parser(
        "status", help="what a run holds: progress, rate, time to go, what is missing or damaged"
    )
    command.add_argument("path", metavar="RUN", help="a run folder, also one that is being written to")
    command.add_argument("--verify", action="store_true", help="read every image and compare its SHA-256")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(call=run_status)

    command = commands.add_parser("report", help="the page of a run, or one page that compares several")
    command.add_argument("paths", nargs="+", metavar="RUN", help="run folders")
    command.add_argument(
        "--out", metavar="FILE", help=f"the page (default RUN/report.html; of several runs {COMPARISON})"
    )
    command.set_defaults(call=run_report)

    command = commands.add_parser("encode", help="encode real images once, for objectives that need them")
    add_fields(command, EncodeConfig)
    command.set_defaults(call=run_encode)

    command = commands.add_parser("train", help="train a small DiT on an image set")
    add_fields(command, TrainConfig)
    command.set_defaults(call=run_train)

    command = commands.add_parser("bench", help="time a step, a trajectory or a discriminator's training")
    command.add_argument(
        "what", choices=BenchConfig.__dataclass_fields__["what"].metadata["choices"], help="what is timed"
    )
    add_fields(command, BenchConfig)
    command.add_argument("--json", action="store_true", help="print one row of JSON")
    command.set_defaults(call=run_bench)

    command = commands.add_parser("env", help="versions, devices, and which optional part is missing and why")
    command.set_defaults(call=run_env)
    for command in commands.choices.values():
        command.allow_abbrev = False
    return parser


def add_fields(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag for every field of a configuration, and --config; flags not given stay out of the namespace."""
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file with settings; flags overrule it")
    hints = typing.get_type_hints(cls)
    effective: Any = resolve(cls, {})
    for field in dataclasses.fields(cls):
        if not field.metadata["cli"]:
            continue
        kinds = typing.get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else ()
        kind = kinds[0] if kinds else hints[field.name]
        extra: dict[str, Any] = {"type": kind}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            names = typing.get_args(kind)[-1] is Ellipsis
            extra = {"type": _names} if names else {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        if field.metadata["choices"]:
            extra["choices"] = field.metadata["choices"]
        default = getattr(effective, field.name)
        notes = [] if default in (None, ()) else [f"default {_shown(default)}"]
        notes += [
            f"{_shown(v[field.name])} with preset {p}"
            for p, v in PRESETS[cls.__name__].items()
            if field.name in v
        ]
        flag = f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"] + (f" ({', '.join(notes)})" if notes else "")
        parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **extra)


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}


def run_distill(args: argparse.Namespace) -> None:
    """`acs-fast distill`."""
    config = resolve(DistillConfig, given(args, DistillConfig), args.config)
    if args.baselines and not args.evaluate:
        raise InputError("--baselines are evaluated, so they need --evaluate; add it or leave them out")
    settings = {
        "path": config.out,
        "baselines": args.baselines,
        "seed": config.seed,
        "device": config.device,
    }
    evaluation = resolve(EvaluateConfig, settings)  # refused, if it must be, before the run
    from acs_fast.curriculum import Run, distill  # deferred: --help starts without torch
    from acs_fast.distributed import join
    from acs_fast.log import Log
    from acs_fast.session import Session

    if args.evaluate:
        from acs_fast.evaluation import check_test_images

        check_test_images(config)
    with join(config.device) as ranks, Stopping() as stopping:
        log = Log(Path(config.out), ranks.rank, config.log_json)
        session = Session(ranks, stopping.check, log.event)
        if args.plan:
            Run(config, args.overwrite, session).show_plan()
            return
        out = distill(config, overwrite=args.overwrite, session=session)
    if not ranks.leads:
        return
    for name in ("images", "manifest.jsonl", "contact_sheet.png"):
        print(f"  {out / name}")
    if args.evaluate:
        report_evaluation(evaluation, as_json=False)


def run_evaluate(args: argparse.Namespace) -> None:
    """`acs-fast evaluate`."""
    settings = {**given(args, EvaluateConfig), "path": args.path}
    report_evaluation(resolve(EvaluateConfig, settings, args.config), args.json)


def report_evaluation(config: EvaluateConfig, as_json: bool) -> None:
    """Evaluate and print the table or the JSON."""
    from acs_fast.evaluation import evaluate, format_results  # deferred: see run_distill

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        results = evaluate(config)
    print(json.dumps(results, indent=2) if as_json else format_results(results))
    report = Path(config.path) / "report.html"
    if report.is_file() and not as_json:
        print(f"  {Path(config.path) / 'results.json'}\n  {report}")


def run_status(args: argparse.Namespace) -> int:
    """`acs-fast status`; 1 for a run that is not finished or not whole."""
    from acs_fast.status import as_json, as_text, status  # deferred: see run_distill

    found = status(args.path, args.verify)
    print(as_json(found) if args.json else as_text(found))
    return 0 if found.whole else 1


def run_report(args: argparse.Namespace) -> None:
    """`acs-fast report`."""
    from acs_fast.report import compare, write_report  # deferred: see run_distill

    runs, out = [Path(path) for path in args.paths], args.out and Path(args.out)
    if out and out.is_dir():
        raise InputError(f"--out {out} is a folder; name the page's file")
    print(f"  {compare(runs, out or Path(COMPARISON)) if len(runs) > 1 else write_report(runs[0], out)}")


def run_encode(args: argparse.Namespace) -> None:
    """`acs-fast encode`."""
    config = resolve(EncodeConfig, given(args, EncodeConfig), args.config)
    if not config.real:
        raise InputError("encode needs the images' folder: --real FOLDER")
    from acs_fast.encoding import encode  # deferred: see run_distill

    out, whole = encode(config)
    print(f"  {out}" if whole else f"  {out}: other ranks have not ended yet")


def run_train(args: argparse.Namespace) -> None:
    """`acs-fast train`."""
    config = resolve(TrainConfig, given(args, TrainConfig), args.config)
    from acs_fast.training import train  # deferred: see run_distill

    print(f"  {train(config)}")


def run_bench(args: argparse.Namespace) -> int:
    """`acs-fast bench`; 1, without a figure, where the check fails."""
    config = resolve(BenchConfig, {**given(args, BenchConfig), "what": args.what}, args.config)
    from acs_fast.bench.measure import bench  # deferred: see run_distill
    from acs_fast.bench.table import table

    row = bench(config)
    print(json.dumps(row) if args.json else table(row))
    return 0 if row["check"]["passed"] else 1


def run_env(args: argparse.Namespace) -> None:
    """`acs-fast env`."""
    from acs_fast.environment import report  # deferred: see run_distill

    print(report())


def _shown(value: Any) -> str:
    """A default as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
