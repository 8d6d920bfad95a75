"""The pages of runs: what stands on them, what they say of what is missing, and that they can be trusted."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from acs_fast import InputError
from acs_fast.cli import main, make_parser
from acs_fast.log import Log
from acs_fast.report import compare, folder, write_report
from acs_fast.report.figures import Row, dots, heat_level, series_of
from acs_fast.report.folder import picture, read_folder, read_starts
from acs_fast.report.markup import Html, mean_std, tag
from acs_fast.report.results import Score, read_results
from tests.report_runs import LOG, ODD, SETS, evaluation, redundancy, write_log, write_run
from tests.runs import refused

FULL: dict[str, Any] = {"evaluations": [evaluation()], "redundancy": redundancy()}


def words(page: Path) -> str:
    """The page's text, without markup and style, in single spaces."""
    return plain(re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page.read_text(), flags=re.S))


def plain(markup: str) -> str:
    """Markup without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def section(page: Path, name: str) -> str:
    """The markup of one part."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', page.read_text(), re.S)
    assert found is not None
    return found[1]


def cells(markup: str) -> list[list[str]]:
    """The rows of the tables in it."""
    rows = re.findall(r"<tr>(.*?)</tr>", markup, re.S)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>([^<]*)<", row)] for row in rows]


def test_the_page_has_every_part_in_order_and_needs_nothing_else(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", results=FULL))
    assert page == tmp_path / "run" / "report.html"
    text = page.read_text()
    names = [
        "accuracy",
        "redundancy",
        "discriminators",
        "images",
        "time",
        "manifest",
        "configuration",
        "reproduce",
    ]
    assert re.findall(r'<section id="(\w+)">', text) == names
    assert "<script" not in text and "http" not in text and "@import" not in text
    assert {link[:1] for link in re.findall(r'(?:href|src)="([^"]*)"', text)} <= {"#", "d"}  # data:
    assert 'class="missing"' not in text


def test_accuracies_stand_with_all_that_they_hang_on(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", results=FULL))
    shown = section(page, "accuracy")
    assert ["distilled", "90.0 ± 0.8", "80.0 ± 0.8"] in cells(shown)
    assert len(cells(shown)) == 1 + len(SETS)
    for text in ("hard-adamw", "convnet-3", "4 images a class", "8 px", "500 real images of digits"):
        assert text in shown
    assert "<li>400 of the protocol&#x27;s 2000 epochs</li>" in shown
    assert "3 repeats with seeds 0 to 2" in shown and "commit 0123456789ab" in shown


def test_redundancy_stands_with_its_matrix_means_and_features(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", results=FULL))
    shown = section(page, "redundancy")
    assert shown.count("cross-increment accuracy of ") == len(SETS)
    assert "Mean over i ≠ j 70.0 ± 0.8 %" in shown and re.search(r">71\.0</text>", shown)
    assert "Features of convnet-3 trained on 1297 real images; 5 nearest neighbours" in shown
    assert ["distilled", "0.812", "1.250", "0.500", "0.250", "8"] in cells(shown)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    entry = evaluation(
        network=evil, deviations=[evil], real=evil, sets={evil + '" onload="': evaluation()["sets"]["plain"]}
    )
    more = redundancy(
        features=evil, sets={f"{name}{evil}": row for name, row in redundancy()["sets"].items()}
    )
    run = write_run(
        tmp_path / "<i>&", (*ODD, "$x^2$"), {"evaluations": [entry], "redundancy": more}, model=evil
    )
    other = shutil.copytree(run, tmp_path / "<b>")
    for page in (write_report(run), compare([run, other], tmp_path / "both.html")):
        text = page.read_text()
        assert "<script" not in text and "<i>" not in text and "<b>" not in text
        assert "&lt;script&gt;alert(1)" in text and not re.search(r'" onload="', text)
    assert "$x^2$" in words(write_report(run))


def test_markup_is_escaped_once() -> None:
    assert (
        tag("p", Html("<b>"), class_="a", aria_label='"&') == '<p class="a" aria-label="&quot;&amp;"><b></p>'
    )
    assert tag("p", "<b>") == "<p>&lt;b&gt;</p>"
    row = Row("a < b", "a & b", 0, Score(1.0, 0.5, (1.0,)), Score(2.0, 0.0))
    drawing = dots("x", [row], "y")
    assert "a &lt; b" in drawing and 'aria-label="y. a &amp; b: best 1.0 ± 0.5' in drawing


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results=FULL)
    other = write_run(tmp_path / "b", results=FULL, seed=1)
    one, both = write_report(run).read_bytes(), compare([run, other], tmp_path / "c").read_bytes()
    os.utime(run / "results.json", (0, 0))
    assert (
        write_report(run).read_bytes() == one and compare([run, other], tmp_path / "c").read_bytes() == both
    )


def test_the_users_own_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    run = write_run(tmp_path / "run", results=FULL)
    before = write_report(run).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "red", "xtick.direction": "in", "axes.ymargin": 0.4}):
        assert write_report(run).read_bytes() == before


@pytest.mark.parametrize(
    ("gone", "part", "text", "command"),
    [
        ("results.json", "accuracy", "was not evaluated yet", "acs-fast evaluate RUN"),
        ("results.json", "redundancy", "No redundancy was measured", "acs-fast evaluate RUN --redundancy"),
        ("logs/rank-0.log", "time", "no log of rank 0", "acs-fast distill --config RUN/config.json"),
        ("manifest.jsonl", "manifest", "No image has a row", "acs-fast distill --config RUN/config.json"),
        ("contact_sheet.png", "images", "no contact sheet", "acs-fast distill --config RUN/config.json"),
        (
            "curricula.json",
            "discriminators",
            "No discriminator is recorded",
            "acs-fast distill --config RUN/con",
        ),
    ],
)
def test_what_is_missing_is_said_with_the_command(tmp_path: Path, gone, part, text, command) -> None:
    run = write_run(tmp_path / "run", results={})
    (run / "results.json").write_text(json.dumps(FULL))
    (run / gone).unlink()
    shown = section(write_report(run), part)
    assert text in shown and shown.count('class="missing"') == 1
    assert plain(shown).count(f": {command.replace('RUN', str(run))}") == 1


def test_parts_of_redundancy_may_be_missing(tmp_path: Path) -> None:
    sets = {"distilled": {"cross_increment": {"matrix": [[100.0]], "mean": None, "std": None, "values": []}}}
    run = write_run(tmp_path / "run", results={**FULL, "redundancy": redundancy(sets=sets)})
    shown = section(write_report(run), "redundancy")
    assert "No incremental accuracy was measured" in shown and "No coverage was measured" in shown
    assert "One increment, so there is nothing to compare" in shown


def test_results_of_an_earlier_version_are_shown(tmp_path: Path) -> None:
    flat = {name: value for name, value in evaluation().items() if name != "deviations"}
    run = write_run(tmp_path / "run", results={**flat, "curricula": []})
    shown = section(write_report(run), "accuracy")
    assert ["plain", "94.0 ± 0.8", "84.0 ± 0.8"] in cells(shown)
    assert "400 of the protocol&#x27;s 2000 epochs" in shown and "images of 8 px; the protocol" in shown


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "7", '{"evaluations": 3}', '{"evaluations": [{}]}', '{"redundancy": [1]}', '{"sets": 1}',
        '{"curricula": [{}]}', json.dumps({"evaluations": [evaluation(sets={"distilled": {"best": 1}})]}),
        json.dumps({"evaluations": [evaluation(epochs="many")]}),
        json.dumps({"redundancy": redundancy(sets={"a": {"cross_increment": {"matrix": [[1, 2]]}}})}),
        '{"evaluations": ' + "[" * 100000,
    ],
)  # fmt: skip
def test_damaged_results_get_one_sentence(tmp_path: Path, text: str, capsys) -> None:
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text(text)
    error = refused(["report", str(run)], capsys)
    assert f"{run / 'results.json'} is damaged (" in error and "evaluate" in error
    assert not (run / "report.html").exists()
    assert "is damaged" in refused(["report", str(run), str(write_run(tmp_path / "two"))], capsys)


@pytest.mark.parametrize(
    ("record", "message"),
    [(None, "is no run folder: there is no"), ("{}", "is not that of a run"), ("[", "is not that of a run")],
)
def test_what_is_no_run_gets_one_sentence(tmp_path: Path, record, message: str, capsys) -> None:
    assert "there is no folder" in refused(["report", str(tmp_path / "absent")], capsys)
    if record is not None:
        (tmp_path / "config.json").write_text(record)
    assert message in refused(["report", str(tmp_path)], capsys)


def test_the_command_writes_one_page_or_a_comparison(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_run(tmp_path / name, results=FULL)
    assert main(["report", "one"]) == 0 and capsys.readouterr().out == "  one/report.html\n"
    assert main(["report", "one", "--out", "page/a.html"]) == 0
    assert Path("page/a.html").read_bytes() == Path("one/report.html").read_bytes()
    assert main(["report", "one", "two"]) == 0
    assert capsys.readouterr().out.endswith("  runs/comparison.html\n")
    assert "Comparison of runs" in Path("runs/comparison.html").read_text()
    assert not Path("two/report.html").exists()
    assert "named twice" in refused(["report", "one", "two", "./one"], capsys)
    assert "--out page is a folder" in refused(["report", "one", "--out", "page"], capsys)


def test_protocols_never_share_a_table(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"protocol": "hard-sgd"}, {"network": "resnet-18"}, {"ipc": 2}, {"image_size": 16},
        {"epochs": 399}, {"deviations": []}, {"test_images": 499},
    ]  # fmt: skip
    one = write_run(tmp_path / "one", results={"evaluations": [evaluation(**change) for change in changes]})
    two = write_run(tmp_path / "two", results={"evaluations": [evaluation()]})
    three = write_run(tmp_path / "three", ("ant", "cat"), {"evaluations": [evaluation()]})
    shown = section(compare([one, two, three], tmp_path / "page.html"), "accuracy")
    tables = [cells(table) for table in re.findall(r"<table>.*?</table>", shown, re.S)]
    runs = [sorted({row[1] for row in table[1:]}) for table in tables]
    assert runs == [["one", "two"], *[["one"]] * 7, ["three"]]
    assert tables[0][1:3] == [[name, run, "90.0 ± 0.8", "80.0 ± 0.8", "3"] for name, run in
                              (("distilled", "one"), ("distilled", "two"))]  # fmt: skip


def test_redundancy_is_compared_only_where_it_was_measured_alike(tmp_path: Path) -> None:
    results = [
        {"redundancy": redundancy(**change)} for change in ({}, {}, {"features": "vgg", "epochs": [9, 9]})
    ]
    runs = [write_run(tmp_path / name, results=r) for name, r in zip("abc", results, strict=True)]
    page = compare([*runs, write_run(tmp_path / "d")], tmp_path / "page.html")
    for part, per_run in (("increments", len(SETS)), ("coverage", len(SETS))):
        tables = [cells(table) for table in re.findall(r"<table>.*?</table>", section(page, part), re.S)]
        assert [sorted({row[1] for row in table[1:]}) for table in tables] == [["a", "b"], ["c"]]
        assert [len(table) - 1 for table in tables] == [2 * per_run, per_run]
    assert f"acs-fast evaluate {tmp_path / 'd'} --redundancy" in plain(section(page, "increments"))


def test_only_settings_that_differ_are_compared(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", cfg_scale=1.5)
    shown = section(compare([one, two], tmp_path / "page.html"), "settings")
    assert cells(shown) == [["setting", "one", "two"], ["cfg_scale", "2.0", "1.5"]]
    same = section(compare([one, write_run(tmp_path / "three")], tmp_path / "page.html"), "settings")
    assert not cells(same) and "None: all settings" in same


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / folder / "run", seed=seed) for seed, folder in enumerate("ab")]
    shown = section(compare(runs, tmp_path / "page.html"), "settings")
    assert cells(shown)[0] == ["setting", *map(str, runs)]


def test_plan_and_actual_time_come_from_the_log(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shown = cells(section(write_report(run), "time"))
    assert shown[1:] == [
        ["sampling", "8 s", "9 s", "1.12"],
        ["discriminators", "2 s", "3 s", "1.50"],
        ["the rest", "—", "1 s", "—"],
        ["total", "10 s", "13 s", "1.30"],
    ]
    write_log(run, "".join(LOG.splitlines(keepends=True)[:4]) + LOG.replace("end images=8", "stop signal=15"))
    first, second = read_starts(run)
    assert (first.images, first.total, second.ended) == (4, 4.5, "stopped") and "killed" in first.ended
    text = section(write_report(run), "time")
    assert "Start 1 of 2" in text and "Start 2 of 2" in text


def test_a_log_without_a_plan_says_how_to_get_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_log(run, "".join(line for line in LOG.splitlines(keepends=True) if " plan " not in line))
    shown = section(write_report(run), "time")
    assert "The plan is not in this log" in shown and "--plan makes it" in plain(shown)
    assert cells(shown)[1] == ["sampling", "—", "9 s", "—"]


def test_distill_writes_its_plan_into_the_log(tiny) -> None:
    from acs_fast import distill
    from acs_fast.session import Session

    config = tiny()
    with Log(Path(config.out)) as log:
        distill(config, session=Session(event=log.event))
    (start,) = read_starts(Path(config.out))
    assert set(start.expected) == {"sampling", "discriminators", "total"} and start.ended == "finished"
    parts = start.expected["sampling"] + start.expected["discriminators"]
    assert start.expected["total"] == pytest.approx(parts, rel=1e-4)  # the log keeps six digits
    assert min(start.expected.values()) > 0 and start.total >= start.sampling + start.discriminators > 0
    assert start.images == start.missing == 8


def test_the_manifest_is_summed_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    size = {p: sum(f.stat().st_size for f in (run / "images").glob(p)) for p in ("*/[01].png", "*/[23].png")}
    shown = section(write_report(run), "manifest")
    rows = {row[0]: row[1:] for row in cells(shown)}
    assert rows["S1"] == ["4", f"{size['*/[01].png']} B", "—", "—", "—", "—"]
    assert rows["S2"][2:] == ["1.688", "1.500", "1.875", "2 of 4"]
    assert rows["ant"][2:] == ["1.625", "1.500", "1.750", "1 of 2"] and rows["all"][0] == "8"
    assert "No two images have the same SHA-256" in shown


def test_equal_images_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    lines[-1]["sha256"] = lines[0]["sha256"]
    (run / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = section(write_report(run), "manifest")
    assert "2 images have the SHA-256 of another one" in shown and "ant/0 = bee/3" in shown


def test_images_in_shards_have_their_sizes(tmp_path: Path) -> None:
    run, keys = (
        write_run(tmp_path / "run", format="wds"),
        [(name, i) for name in ("ant", "bee") for i in (0, 1)],
    )
    before = read_folder(run).summary
    images = folder.Images(run, "wds")
    images.pack(1, 0, keys)
    assert not images.path(("ant", 0)).exists() and read_folder(run).summary == before


def test_a_run_of_a_thousand_classes_has_a_small_page(tmp_path: Path) -> None:
    names = tuple(f"n{number:08d}" for number in range(1000))
    page = write_report(write_run(tmp_path / "run", names, FULL))
    text = section(page, "manifest")
    assert page.stat().st_size < 2_500_000 and len(cells(text)) < 40
    assert "1000 classes of 4 to 4 images" in text
    listed = [row[0] for row in cells(text) if row[0].startswith("n")]
    assert listed == [*names[:10], *names[-10:]]  # loss rises with the class
    assert "and 900 more" in section(page, "configuration")


def test_a_large_contact_sheet_is_made_smaller(tmp_path: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "run")
    whole = picture(read_folder(run))
    assert whole is not None and whole.data == (run / "contact_sheet.png").read_bytes() and whole.pixels
    monkeypatch.setattr(folder, "LARGE", 100)
    monkeypatch.setattr(folder, "LARGE_PIXELS", 5000)
    small = picture(read_folder(run))
    assert small is not None and small.kind == "image/jpeg" and small.width * small.height <= 5000
    assert small.width / small.height == pytest.approx(whole.width / whole.height, rel=0.05)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = (run / "manifest.jsonl").read_text().splitlines(keepends=True)
    (run / "manifest.jsonl").write_text("".join(rows[:5]))
    assert "Unfinished: 5 of 8 images are written" in words(write_report(run))


def test_the_commands_are_those_of_the_command_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", results={"evaluations": [evaluation(), evaluation(epochs=2000)]})
    text = section(write_report(run), "reproduce")
    commands = [plain(line) for line in re.findall(r"<code>(.*?)</code>", text)]
    assert [shlex.split(command)[:2] for command in commands] == [
        ["acs-fast", name] for name in ("distill", "evaluate", "evaluate", "report")
    ]
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])
    args = make_parser().parse_args(shlex.split(commands[1])[1:])
    assert (args.path, args.protocol, args.network, args.ipc) == (
        str(run),
        ("hard-adamw",),
        ("convnet-3",),
        4,
    )
    assert (args.epochs, args.repeats, args.seed, args.real) == (400, 3, 0, "digits")
    assert args.baselines == ("random", "plain") and "--epochs" not in commands[2]
    again = make_parser().parse_args(shlex.split(commands[0])[1:])
    assert again.out == str(tmp_path / "a run-again") and again.config == str(run / "config.json")


def test_known_sets_keep_their_colours() -> None:
    assert series_of(["plain", "distilled"]) == {"plain": 1, "distilled": 0}
    assert len(set(series_of([*SETS, "another"]).values())) == len(SETS) + 1


def test_small_numbers_of_the_drawings() -> None:
    assert [heat_level(value, (50.0, 100.0)) for value in (40, 50, 75, 100, float("nan"))] == [0, 0, 4, 8, 0]
    assert heat_level(100.0, (100.0, 100.0)) == 4
    assert mean_std(12.345, 0.06, 2) == "12.3 ± 0.1" and mean_std(float("nan"), 0.0, 2) == "—"
    assert mean_std(12.345, 0.0, 1) == "12.3"


def test_no_results_are_no_error(tmp_path: Path) -> None:
    assert read_results(tmp_path).evaluations == ()
    with pytest.raises(InputError, match="there is no folder"):
        compare([tmp_path / "absent"], tmp_path / "page.html")
