"""A sweep plans the runs its file says, skips what is done, and records failures without stopping."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import yaml

from lm.__main__ import main
from lm.checkpoint import InUseError, lock_run
from lm.sweep import PlannedRun, execute, plan, sweep


def write(path: Path, content: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    write(tmp_path / "base.yaml", {"model": {"schedule": {"warmup_steps": 2}}})
    write(tmp_path / "post.yaml", {})
    return write(
        tmp_path / "sweep.yaml",
        {
            "study": "learning_rate",
            "configs": ["base.yaml"],
            "grid": {"model.optimizer.lr": [0.1, 0.01]},
            "runs": [
                {"name": "pre"},
                {"name": "post", "configs": ["post.yaml"], "settings": {"model.transformer.d_ff": 3}},
            ],
            "seeds": [0, 1],
            "scales": {"cpu": {"trainer.max_steps": 5}, "gpu": {"configs": ["post.yaml"]}},
        },
    )


def test_plan_is_the_product_of_variants_grid_and_seeds(grid: Path) -> None:
    runs = plan(grid, "cpu")
    assert len(runs) == 2 * 2 * 2
    assert len({run.name for run in runs}) == 8
    assert runs[0].name == "pre-lr_0.1-seed_0"
    assert dict(runs[-1].settings) == {
        "trainer.max_steps": 5,
        "model.transformer.d_ff": 3,
        "model.optimizer.lr": 0.01,
        "seed_everything": 1,
        "data.seed": 1,
    }
    assert [Path(name).name for name in runs[-1].configs] == ["base.yaml", "post.yaml"]


def test_a_value_with_a_slash_names_no_folder_of_its_own(grid: Path) -> None:
    write(grid, {"study": "texts", "grid": {"data.train_text": ["texts/a.txt"]}})
    assert [run.name for run in plan(grid)] == ["train_text_texts_a.txt-seed_0"]


def test_a_scale_may_add_configs(grid: Path) -> None:
    assert [Path(name).name for name in plan(grid, "gpu")[0].configs] == ["base.yaml", "post.yaml"]


def test_a_variant_may_have_its_own_scales(grid: Path) -> None:
    content = yaml.safe_load(grid.read_text())
    content["runs"] = [
        {
            "name": "long",
            "settings": {"trainer.max_steps": 7},
            "scales": {"cpu": {"configs": ["post.yaml"], "trainer.max_steps": 9}},
        }
    ]
    write(grid, content)
    cpu, gpu = plan(grid, "cpu")[0], plan(grid, "gpu")[0]
    assert dict(cpu.settings)["trainer.max_steps"] == 9
    assert dict(gpu.settings)["trainer.max_steps"] == 7
    assert [Path(name).name for name in cpu.configs] == ["base.yaml", "post.yaml"]


def test_include_chains_studies(grid: Path) -> None:
    write(grid.parent / "other.yaml", yaml.safe_load(grid.read_text()) | {"study": "other"})
    both = write(grid.parent / "all.yaml", {"include": ["sweep.yaml", "other.yaml"]})
    assert len(plan(both, "cpu")) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, "unknown key 'grids'; a sweep has configs, grid"),
        ({"study": None}, "`study` is missing"),
        ({}, "no scale 'tpu'"),
        ({"runs": 3}, "runs of a sweep must be a list"),
        ({"runs": ["a"]}, "number 1 of runs must be a mapping"),
        ({"runs": [{"name": "a", "setings": {}}]}, "unknown key 'setings'; run 1 has configs, name"),
        ({"runs": [{"name": "a", "scales": {"cpus": {}}}]}, "unknown key 'cpus'; scales of run 1 has cpu, gpu"),
        ({"grid": {"model.lr": 3}}, "model.lr of grid must be a list"),
        ({"scales": {"tpu": {"grid": {"model.lr": 3}}}}, "model.lr of grid of scale tpu must be a list"),
        ({"scales": {"tpu": {"configs": "a.yaml"}}}, "configs of scale tpu must be a list"),
        ({"scales": {"tpu": 3}}, "tpu of scales must be a mapping"),
        ({"seeds": None}, "seeds of a sweep must be a list"),
    ],
)
def test_bad_files_are_named(grid: Path, change: dict[str, object], message: str) -> None:
    content = yaml.safe_load(grid.read_text()) | change
    if content.get("study") is None:
        del content["study"]
    write(grid, content)
    with pytest.raises(ValueError, match=message):
        plan(grid, "tpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("study: [a\nconfigs: b", r"^\S*bad\.yaml, line 2: no valid YAML: expected ',' or '\]'"),
        ("- study: a", r"^\S*bad\.yaml: a mapping of settings is wanted .*, not a list$"),
        ("study", r"^\S*bad\.yaml: a mapping of settings is wanted .*, not a str$"),
        ("study: a\nseeds: [0]\nstudy: b", r"^\S*bad\.yaml, line 3: 'study' is given twice \(first in line 1\)$"),
        ("study: \0", r"^\S*bad\.yaml: no valid YAML: "),
    ],
)
def test_no_yaml_and_no_mapping_is_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "bad.yaml").write_text(content)
    assert main(["sweep", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line.removeprefix("error: "))


def test_two_runs_of_one_name_are_refused(grid: Path) -> None:
    content = yaml.safe_load(grid.read_text()) | {"grid": {}, "seeds": [0]}
    write(
        grid,
        content
        | {
            "runs": [
                {"settings": {"model.transformer.d_ff": 3}},
                {"settings": {"model.transformer.d_ff": 4}},
            ]
        },
    )
    with pytest.raises(ValueError, match=r"sweep\.yaml: more than one run would go to learning_rate/seed_0; give each"):
        plan(grid, "cpu")
    write(grid, content)
    both = write(grid.parent / "all.yaml", {"include": ["sweep.yaml", "sweep.yaml"]})
    with pytest.raises(ValueError, match=r"all\.yaml: .* learning_rate/pre-seed_0, learning_rate/post-seed_0;"):
        plan(both, "cpu")


def test_dry_run_prints_commands_a_shell_takes(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(str(grid), scale="cpu", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("python -m lm fit --config ")
    assert "--trainer.max_steps 5 --model.optimizer.lr 0.1 --seed_everything 0" in lines[0]


def test_what_will_be_refused_is_said_before_the_first_run(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm.sweep.subprocess", finish(tmp_path / "logs", "finished"))
    content = yaml.safe_load(grid.read_text())
    write(grid, content | {"grid": {"model.transformer.num_heads": [3, 4]}})
    sweep(str(grid), scale="cpu", logs=str(tmp_path / "logs"))
    said = capsys.readouterr()
    line = "num_heads=3 must divide d_model=128"
    assert said.err == f"warning: 4 of 8 runs, pre-num_heads_3-seed_0 the first: model.transformer: {line}\n"
    assert said.out.count(": finished in ") == 8, "they are tried all the same"
    write(grid, content | {"study": "mine", "grid": {"model.optimzer.lr": [1, 2]}})
    for dry_run in (True, False):
        with contextlib.nullcontext() if dry_run else pytest.raises(ValueError, match="no run can be made"):
            sweep(str(grid), scale="cpu", dry_run=dry_run, logs=str(tmp_path / "logs"))
        assert "8 of 8 runs, pre-lr_1-seed_0 the first: --model.optimzer.lr is no option" in capsys.readouterr().err
    assert not (tmp_path / "logs/mine").exists()


def test_a_setting_may_be_a_list(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.sweep.subprocess", finish(tmp_path / "logs", "finished"))
    runs = [{"name": "chat", "settings": {"data.special_tokens": ["<|user|>"]}}]
    write(grid, {"study": "learning_rate", "configs": ["base.yaml"], "runs": runs})
    sweep(str(grid), logs=str(tmp_path / "logs"))
    assert PlannedRun("learning_rate", "chat-seed_0", (), ()).status(str(tmp_path / "logs")) == "finished"


def finish(logs: Path, status: str) -> SimpleNamespace:
    """A stand-in for the training process: writes the summary that a run of that name would leave."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        name = command[command.index("--run.name") + 1]
        version = logs / "learning_rate" / name / "version_0"
        version.mkdir(parents=True)
        (version / "summary.json").write_text(json.dumps({"status": status}))
        return SimpleNamespace(returncode={"finished": 0, "diverged": 3, "failed": 1}[status])

    return SimpleNamespace(run=run, STDOUT=subprocess.STDOUT)


def test_done_runs_are_skipped_and_failures_retried(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    first, second = plan(grid, "cpu")[:2]
    for run, status in ((first, "diverged"), (second, "failed")):
        finish(logs, status).run(["--run.name", run.name])
    assert first.status(str(logs)) == "diverged"
    (logs / "learning_rate" / second.name / "version_0" / "summary.json").unlink()
    (logs / "learning_rate" / second.name / "version_0").rmdir()

    monkeypatch.setattr("lm.sweep.subprocess", finish(logs, "finished"))
    sweep(str(grid), scale="cpu", logs=str(logs), jobs=2)
    assert "8 runs, 1 of them done before" in capsys.readouterr().out
    record = json.loads((logs / "learning_rate" / second.name / "record.json").read_text())
    assert record["status"] == "finished"
    sweep(str(grid), scale="cpu", logs=str(logs))
    assert "8 of them done before" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["scale", "texts", "file", "config"])
def test_the_result_of_another_experiment_is_not_taken_for_this_ones(
    change: str, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, texts = tmp_path / "logs", tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "valid"):
        (texts / f"stories-{split}.txt").touch()
    write(grid, content := yaml.safe_load(grid.read_text()) | {"text": "stories"})
    monkeypatch.setattr("lm.sweep.subprocess", finish(logs, "finished"))
    sweep(str(grid), scale="cpu", logs=str(logs))
    before = {path: path.read_bytes() for path in logs.rglob("*.json")}

    monkeypatch.setattr("lm.sweep.subprocess", None)
    scale = "gpu" if change == "scale" else "cpu"
    if change == "file":
        content["runs"][1]["settings"] = {"model.transformer.d_ff": 4}
        write(grid, content)
    if change == "config":
        write(tmp_path / "base.yaml", {"model": {"schedule": {"warmup_steps": 3}}})
    words = ["sweep", str(grid), "--scale", scale, "--logs", str(logs)]
    words += ["--texts", str(texts)] if change == "texts" else []
    capsys.readouterr()
    assert main(words) == 2
    said, (line,) = (lambda out: (out.out, out.err.splitlines()))(capsys.readouterr())
    first, count = ("post-lr_0.1-seed_0", 4) if change == "file" else ("pre-lr_0.1-seed_0", 8)
    assert line.startswith(f"error: {logs / 'learning_rate' / first} holds another experiment")
    assert f"({count} of the 8 runs' folders do)" in line
    assert f"--logs {logs}_{scale}" in line
    assert not said
    assert {path: path.read_bytes() for path in logs.rglob("*.json")} == before
    assert main([*words, "--dry_run"]) == 0
    dry = capsys.readouterr()
    assert len(dry.out.splitlines()) == 8
    assert dry.err == line.replace("error", "warning") + "\n"

    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr("lm.sweep.subprocess", finish(elsewhere, "finished"))
    words[words.index(str(logs))] = str(elsewhere)
    assert main(words) == 0
    assert "8 runs, 0 of them done before" in capsys.readouterr().out
    assert main(words) == 0
    assert "8 runs, 8 of them done before" in capsys.readouterr().out


def test_only_a_result_or_a_checkpoint_makes_a_folder_anothers(grid: Path, tmp_path: Path) -> None:
    """A run that failed at once may be mended in the file; what `--resume auto` would go on from may not."""
    logs = tmp_path / "logs"
    run, other = plan(grid, "cpu")[0], plan(grid, "gpu")[0]
    folder = logs / run.study / run.name
    (folder / "version_0").mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"status": "failed", "experiment": run.experiment}))
    assert not other.meets_another(str(logs))
    (folder / "version_0" / "checkpoints").mkdir()
    (folder / "version_0" / "checkpoints" / "step_10.ckpt").touch()
    assert other.meets_another(str(logs))
    assert not run.meets_another(str(logs))


def test_a_killed_sweep_has_said_whose_checkpoints_it_leaves(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    run = plan(grid, "cpu")[0]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lm.sweep.subprocess", SimpleNamespace(run=killed, STDOUT=subprocess.STDOUT))
    with pytest.raises(KeyboardInterrupt):
        execute(run, str(logs), None)
    record = json.loads((logs / run.study / run.name / "record.json").read_text())
    assert (record["status"], record["experiment"]) == ("started", run.experiment)


def test_what_a_run_says_is_added_to_what_it_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], stdout: IO[bytes], **_: object) -> SimpleNamespace:
        stdout.write(b"out of memory\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr("lm.sweep.subprocess", SimpleNamespace(run=failing, STDOUT=subprocess.STDOUT))
    for _ in range(2):
        execute(PlannedRun("study", "run", (), ()), str(tmp_path), None)
    assert (tmp_path / "study" / "run" / "output.txt").read_text() == "out of memory\n" * 2


def test_a_run_of_a_job_array_is_known_by_its_configuration(grid: Path, tmp_path: Path) -> None:
    """It has no record; the data section of its config.yaml names what was made of the text."""
    logs = tmp_path / "logs"
    run = plan(grid, "cpu")[0]
    finish(logs, "finished").run(["--run.name", run.name])
    had = {"trainer": {"max_steps": 5}, "model": {"optimizer": {"lr": 0.1}}, "data": {"vocab_size": None, "seed": 0}}
    config = logs / run.study / run.name / "version_0" / "config.yaml"
    write(config, had)
    assert not run.meets_another(str(logs))
    write(config, had | {"trainer": {"max_steps": 6}})
    assert run.meets_another(str(logs))


def another_ends_the_last(
    monkeypatch: pytest.MonkeyPatch, logs: Path, runs: list[PlannedRun], record: dict[str, str] | None = None
) -> None:
    """The first run takes long: meanwhile another sweep ends the last, with this record."""
    makes = finish(logs, "finished").run

    def run(command: list[str], **options: object) -> SimpleNamespace:
        if command[command.index("--run.name") + 1] == runs[0].name:
            makes(["--run.name", runs[-1].name])
            if record:
                (logs / "learning_rate" / runs[-1].name / "record.json").write_text(json.dumps(record))
        return makes(command, **options)

    monkeypatch.setattr("lm.sweep.subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


def test_another_experiment_that_began_meanwhile_is_left_alone(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    runs = plan(grid, "cpu")
    another_ends_the_last(
        monkeypatch, logs, runs, {"status": "finished", "experiment": plan(grid, "gpu")[-1].experiment}
    )
    with pytest.raises(SystemExit, match=f"1 of 8 runs failed: learning_rate/{runs[-1].name} "):
        sweep(str(grid), scale="cpu", logs=str(logs))
    assert f"{runs[-1].name}: another sweep has begun another experiment there" in capsys.readouterr().out


def test_the_newest_version_has_the_status_and_a_copy_beside_it_none(grid: Path, tmp_path: Path) -> None:
    run = plan(grid, "cpu")[0]
    for name, status in {"version_9": "failed", "version_10": "finished", "version_9-old": "diverged"}.items():
        version = tmp_path / "logs" / run.study / run.name / name
        version.mkdir(parents=True)
        (version / "summary.json").write_text(json.dumps({"status": status}))
    assert run.status(str(tmp_path / "logs")) == "finished"


def test_a_failed_run_does_not_stop_the_others(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "logs"
    monkeypatch.setattr("lm.sweep.subprocess", finish(logs, "failed"))
    with pytest.raises(SystemExit, match="8 of 8 runs failed"):
        sweep(str(grid), scale="cpu", logs=str(logs))
    assert len(list(logs.rglob("record.json"))) == 8


def test_a_run_that_another_sweep_makes_is_left_to_it(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    runs = plan(grid, "cpu")
    another_ends_the_last(monkeypatch, logs, runs)
    with lock_run(logs / "learning_rate" / runs[1].name):
        sweep(str(grid), scale="cpu", logs=str(logs))
    said = capsys.readouterr().out
    assert f"{runs[1].name}: left to process {os.getpid()} on " in said
    assert f"{runs[-1].name}: made by another sweep meanwhile" in said
    assert said.count("finished in") == len(list(logs.rglob("record.json"))) == 6
    sweep(str(grid), scale="cpu", logs=str(logs))
    assert f"{runs[1].name}: finished in" in capsys.readouterr().out


def test_a_run_keeps_its_lock_when_its_sweep_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm import sweep as module

    children = []

    def start(command: list[str], pass_fds: list[int], **_: object) -> SimpleNamespace:
        waits = [sys.executable, "-c", "input()"]
        children.append(subprocess.Popen(waits, stdin=subprocess.PIPE, pass_fds=pass_fds))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=start, STDOUT=subprocess.STDOUT))
    run = PlannedRun("study", "run", (), ())
    with lock_run(tmp_path / "study" / "run") as lock:
        module.execute(run, str(tmp_path), None, lock=lock)
    with pytest.raises(InUseError, match="is in use by process"):
        lock_run(tmp_path / "study" / "run")
    children[0].communicate(b"\n")
    lock_run(tmp_path / "study" / "run").close()


def test_the_device_reaches_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm import sweep as module

    seen = []
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, env, **_: seen.append(env) or SimpleNamespace(returncode=1)
    )
    run = PlannedRun("study", "run", (), ())
    assert module.execute(run, str(tmp_path), "2")["status"] == "failed"
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "2"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "2"
    assert sys.executable


def test_blanks_between_the_names_of_devices_do_not_count(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, stub = [], finish(tmp_path, "finished")
    end = stub.run
    stub.run = lambda command, env, **_: seen.append(env["CUDA_VISIBLE_DEVICES"]) or end(command)
    monkeypatch.setattr("lm.sweep.subprocess", stub)
    sweep(str(grid), scale="cpu", logs=str(tmp_path), devices=" 0 , 1")
    assert set(seen) == {"0", "1"}


def test_texts_of_ones_own_replace_the_corpus(grid: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    content = yaml.safe_load(grid.read_text())
    assert plan(grid, "cpu", texts) == plan(grid, "cpu"), "a file without `text` keeps its corpus"
    write(grid, content | {"text": "stories"})
    with pytest.raises(FileNotFoundError, match=r"stories-train\.txt is not there"):
        plan(grid, "cpu", texts)
    (texts / "stories-train.txt.xz").touch()
    (texts / "stories-valid.jsonl.gz").touch()
    settings = dict(plan(grid, "cpu", texts)[0].settings)
    assert settings["data.train_text"] == str(texts / "stories-train.txt.xz")
    assert settings["data.valid_text"] == str(texts / "stories-valid.jsonl.gz")


def test_a_run_of_several_studies_is_made_once(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others say the same in another way: in their settings, not in a grid."""
    logs = tmp_path / "logs"
    monkeypatch.setattr("lm.sweep.subprocess", finish(logs, "finished"))
    sweep(str(grid), scale="cpu", logs=str(logs))
    content = yaml.safe_load(grid.read_text())
    del content["grid"], content["runs"]
    content["seeds"] = [0]
    content["scales"]["cpu"]["model.optimizer.lr"] = 0.1
    made = logs / "learning_rate" / "pre-lr_0.1-seed_0"
    (checkpoints := made / "version_0" / "checkpoints").mkdir()
    (made / "lock").write_text("the maker's")
    monkeypatch.setattr("lm.sweep.subprocess", None)
    for study in ("earlier", "other"):  # in the alphabet, one before the maker and one after
        sweep(str(write(grid, content | {"study": study})), scale="cpu", logs=str(logs))
        copied = logs / study / "seed_0"
        assert json.loads((copied / "record.json").read_text())["copied_from"] == "learning_rate/pre-lr_0.1-seed_0"
        assert (copied / "version_0" / "summary.json").is_file()
        assert "maker" not in (copied / "lock").read_text()
        assert not (copied / "version_0" / "checkpoints").exists()
    assert checkpoints.is_dir()


def test_a_scale_may_bring_its_own_grid(grid: Path) -> None:
    content = yaml.safe_load(grid.read_text())
    content["scales"]["cpu"]["grid"] = {"model.optimizer.lr": [0.5]}
    write(grid, content)
    assert {dict(run.settings)["model.optimizer.lr"] for run in plan(grid, "cpu")} == {0.5}
    assert len(plan(grid, "gpu")) == 8


def test_the_result_of_a_failed_twin_is_not_taken(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "logs"
    run = plan(grid, "cpu")[0]
    other = logs / "other" / "twin"
    other.mkdir(parents=True)
    (other / "record.json").write_text(json.dumps({"status": "failed", "seconds": 1, "experiment": run.experiment}))
    monkeypatch.setattr("lm.sweep.subprocess", finish(logs, "finished"))
    sweep(str(grid), scale="cpu", logs=str(logs))
    record = json.loads((logs / "learning_rate" / run.name / "record.json").read_text())
    assert record["status"] == "finished" and "copied_from" not in record


@pytest.mark.parametrize(("said", "threads"), [(None, "4"), ("1", "1")])
def test_jobs_share_the_cores_unless_the_user_said_how_many_threads(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, threads: str
) -> None:
    seen, stub = [], finish(tmp_path, "finished")
    end = stub.run
    stub.run = lambda command, env, **_: seen.append(env.get("OMP_NUM_THREADS")) or end(command)
    monkeypatch.setattr("lm.sweep.subprocess", stub)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    sweep(str(grid), scale="cpu", logs=str(tmp_path), jobs=2)
    assert set(seen) == {threads}
