"""A page holds what the run files hold: figures recomputed by hand here, spread over seeds, divergences as rows."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import yaml

from lm.__main__ import main
from lm.report import (
    find_runs,
    group_by_settings,
    highest_shown,
    numeric_setting,
    read_metrics,
    report,
    varied_settings,
)


def write_run(study: Path, name: str, lr: float, seed: int, losses: list[float], status: str = "finished") -> Path:
    version = study / name / "version_0"
    version.mkdir(parents=True)
    model = {"optimizer": {"lr": lr}, "depth": 2}
    config = {"seed_everything": seed, "data": {"seed": seed}, "model": model, "run": {"name": name}}
    (version / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": 10 * k, "wall_seconds": 1.5 * k, "tokens_seen": 640 * k, "train/loss": loss + 0.1, "val/loss": loss}
        | {"val/bits_per_byte": loss / 4}
        for k, loss in enumerate(losses, start=1)
    ]
    (version / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (version / "summary.json").write_text(json.dumps({"status": status}))
    return version


@pytest.fixture
def study(tmp_path: Path) -> Path:
    study = tmp_path / "learning_rate"
    for seed, final in enumerate([2.0, 2.2, 2.4]):
        write_run(study, f"lr_0.01-seed_{seed}", 0.01, seed, [4.0, 3.0, final])
        write_run(study, f"lr_0.001-seed_{seed}", 0.001, seed, [4.5, 3.5, final + 1])
    write_run(study, "lr_1-seed_0", 1.0, 0, [5.0, math.nan], status="diverged")
    return study


def test_only_what_differs_is_compared(study: Path) -> None:
    assert varied_settings(find_runs(study)) == ["model.optimizer.lr"]


def test_groups_are_seeds_of_one_setting_best_first(study: Path) -> None:
    groups = group_by_settings(find_runs(study))
    assert [group.label for group in groups] == ["lr_0.01", "lr_0.001", "lr_1"]
    assert groups[0].losses == [2.0, 2.2, 2.4]
    assert groups[-1].mean_loss == math.inf


def test_report_says_mean_and_standard_deviation(study: Path) -> None:
    (study / "NOTES.md").write_text("# Which learning rate?\n\nThe largest that is stable.\n")
    report("learning_rate", logs=str(study.parent))
    page = (study / "REPORT.md").read_text()
    assert page.startswith("# Which learning rate?\n\nThe largest that is stable.\n")
    assert (
        f"| `lr_0.01` | `optimizer.lr=0.01` | 3 | 2.2000 ± {statistics.stdev([2.0, 2.2, 2.4]):.4f} | 2.0000 |" in page
    )
    assert "| `lr_1-seed_0` | 0 | 20 |" in page
    assert "diverged" in page
    assert f"| {statistics.fmean([2.0, 2.2, 2.4]) / 4:.4f} |" in page, "bits per byte"


@pytest.mark.slow
def test_curves_are_drawn_the_same_twice(study: Path) -> None:
    pytest.importorskip("matplotlib")
    report("learning_rate", logs=str(study.parent))
    first = (study / "loss_by_steps.svg").read_bytes()
    report("learning_rate", logs=str(study.parent))
    assert (study / "loss_by_steps.svg").read_bytes() == first
    assert (study / "loss_by_wall_clock.png").read_bytes().startswith(b"\x89PNG")


def test_two_values_of_a_setting_are_no_curve(study: Path) -> None:
    groups = group_by_settings(find_runs(study))
    assert numeric_setting(groups) == "model.optimizer.lr"
    assert numeric_setting(groups[:2]) is None


def test_a_numeric_setting_gets_a_picture_of_its_own(study: Path) -> None:
    pytest.importorskip("matplotlib")
    report("learning_rate", logs=str(study.parent))
    assert "![final loss against model.optimizer.lr](final_loss.png)" in (study / "REPORT.md").read_text()
    assert (study / "final_loss.png").is_file()


def test_more_variants_than_colours_are_ranked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for number in range(12):
        write_run(tmp_path, f"variant{chr(97 + number)}-seed_0", 0.1 * (1 + number % 4), 0, [3.0 - number / 10])
    monkeypatch.setattr("lm.report.plot_curves", lambda *_: [])
    monkeypatch.setattr("lm.report.plot_final_loss", lambda *_: pytest.fail("lines of twelve names"))
    report(tmp_path.name, logs=str(tmp_path.parent))
    assert "![final loss of each](final_loss.png)" in (tmp_path / "REPORT.md").read_text()
    names = re.findall(r"<!-- (variant\w) -->", (tmp_path / "final_loss.svg").read_text())
    assert names == [f"variant{letter}" for letter in "lkjihgfedcba"]  # best first


def test_names_without_a_seed_leave_the_settings_as_the_label(tmp_path: Path) -> None:
    write_run(tmp_path, "first", 0.1, 0, [2.0])
    write_run(tmp_path, "second", 0.2, 0, [1.0])
    groups = group_by_settings(find_runs(tmp_path))
    assert [(group.label, group.settings) for group in groups] == [("optimizer.lr=0.2", ""), ("optimizer.lr=0.1", "")]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_named(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2]
    metrics.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(metrics)


def test_the_newest_version_of_a_run_counts(study: Path) -> None:
    newer = study / "lr_0.01-seed_0" / "version_10"
    newer.mkdir()
    (newer / "metrics.jsonl").write_text(json.dumps({"step": 10, "wall_seconds": 1.0, "val/loss": 1.0}) + "\n")
    runs = {run.name: run for run in find_runs(study)}
    assert runs["lr_0.01-seed_0"].final_loss == 1.0
    assert runs["lr_0.01-seed_0"].status == "unfinished"


def test_the_settings_are_those_that_the_run_was_last_gone_on_with(study: Path) -> None:
    version = study / "lr_0.01-seed_0" / "version_0"
    for time, lr in (("20260102-090000", 0.3), ("20251231-100000", 0.2)):
        (version / f"config-resumed-{time}.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"lr": lr}}}))
    assert find_runs(study)[3].settings == {"model.optimizer.lr": 0.3}


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("contents", ["{'a': [1,", "only words"])
def test_a_damaged_file_is_named_in_one_line(study: Path, name: str, contents: str) -> None:
    damaged = study / "lr_1-seed_0" / "version_0" / name
    damaged.write_text(contents)
    with pytest.raises(ValueError, match=f"{re.escape(str(damaged))} is .*damaged") as error:
        find_runs(study)
    assert len(str(error.value).splitlines()) == 1


def test_a_copy_beside_a_run_does_not_count(study: Path) -> None:
    before = find_runs(study)
    version = study / "lr_0.01-seed_0" / "version_0"
    version.with_name("version_0-old").mkdir()
    (version.with_name("version_0-old") / "metrics.jsonl").write_text('{"step": 10, "val/loss": 0.5}\n')
    assert find_runs(study) == before


def test_a_path_to_the_study_is_as_good_as_its_name(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parent.parent)
    logs = study.parent.name
    report("learning_rate", logs=logs)
    page = (study / "REPORT.md").read_text()
    assert f"by `python -m lm report learning_rate --logs {logs}`" in page
    (study / "REPORT.md").unlink()
    report(f"{logs}/learning_rate/", logs=logs)
    assert (study / "REPORT.md").read_text() == page
    report(f"{logs}/learning_rate")
    assert f"`python -m lm report {logs}/learning_rate`" in (study / "REPORT.md").read_text(), "of another folder"


def fail(study: Path, name: str, output: str | None) -> None:
    """What a sweep leaves of a run that failed."""
    (study / name).mkdir(exist_ok=True)
    (study / name / "record.json").write_text(json.dumps({"status": "failed", "exit_code": 2}))
    if output is not None:
        (study / name / "output.txt").write_text(output)


def test_a_run_that_failed_is_named_with_its_last_words(study: Path) -> None:
    report("learning_rate", logs=str(study.parent))
    assert "Failed" not in (study / "REPORT.md").read_text()
    fail(study, "lr_9-seed_0", "first try\nerror: data.batch_size=0 must be at least 1\n\n")
    fail(study, "lr_9-seed_1", None)
    write_run(study, "lr_0.01-seed_7", 0.01, 7, [4.0, 3.5], status="unfinished")
    fail(study, "lr_0.01-seed_7", "step 20\nRuntimeError: out of memory")
    fail(study, "lr_0.01-seed_0", "of a try before the one that finished")
    report("learning_rate", logs=str(study.parent))
    [section] = re.findall("## Failed\n\n((?:- .*\n)+)\n", (study / "REPORT.md").read_text())
    assert section.splitlines() == [
        "- `lr_0.01-seed_7`: RuntimeError: out of memory",
        "- `lr_9-seed_0`: error: data.batch_size=0 must be at least 1",
        "- `lr_9-seed_1`: it said nothing",
    ]


def test_a_study_of_which_every_run_failed_says_why(tmp_path: Path) -> None:
    fail(tmp_path, "lr_9-seed_0", "error: no room\n")
    with pytest.raises(ValueError, match=r"every run in .* failed, lr_9-seed_0 with: error: no room$"):
        report(tmp_path.name, logs=str(tmp_path.parent))


def test_runs_are_compared_on_the_screen(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(study.parent, "first", 0.5, 0, [3.0, 2.5])
    newest = write_run(study.parent, "second", 0.25, 1, [3.0])
    newest.rename(newest.with_name("version_10"))
    write_run(study.parent, "second", 0.125, 1, [9.0])
    monkeypatch.chdir(study.parent)
    assert main(["report", "first", "--against", "second,second/version_0,learning_rate/lr_1-seed_0", "--logs=."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split("  +", line) for line in lines] == [
        ["", "first", "second", "second/version_0", "learning_rate/lr_1-seed_0"],
        ["val/loss", "2.5000", "3.0000", "9.0000", "5.0000"],
        ["val/bits_per_byte", "0.6250", "0.7500", "2.2500", "1.2500"],
        ["steps", "20", "10", "10", "20"],
        ["tokens", "1,280", "640", "640", "1,280"],
        ["wall s", "3", "2", "2", "3"],
        ["status", "finished", "finished", "finished", "diverged"],
        ["model.optimizer.lr", "0.5", "0.25", "0.125", "1.0"],
        ["seed_everything", "0", "1", "1", "0"],
    ]
    assert not list(study.parent.rglob("REPORT.md"))
    assert main(["report", "learning_rate", "--against", "first", "--logs=."]) == 0
    assert capsys.readouterr().out.split()[:2] == ["learning_rate/lr_0.001-seed_0", "learning_rate/lr_0.001-seed_1"]
    assert main(["report", "first", "--against", "third", "--logs=."]) == 2
    assert "no runs in third: make some with `python -m lm fit`" in capsys.readouterr().err


def test_no_runs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no runs in .*nothing"):
        report("nothing", logs=str(tmp_path))


def test_a_run_that_went_wrong_does_not_squeeze_the_others() -> None:
    assert highest_shown([1.0, 2.5, 2.6, 9.0]) == 2.5
