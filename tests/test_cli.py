"""The command line: what is listed, what is refused and how, what a bare command takes."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from toy import SETTINGS, command, make_dataset

from lm import __main__
from lm.checkpoint import best_checkpoint
from lm.defaults import choose_data, default_run_name, option, options
from lm.options import explain, is_first_rank
from lm.parser import TRAINER_OPTIONS
from lm.problems import device_problems, process_problems
from lm.ranks import end_with, find_culprit, make_strategy, num_devices
from tokenizer.__main__ import main as tokenizer_main

Run = Callable[..., int]
RUN = Path("logs/toy/version_0")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`python -m lm ...` in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])

    def lm(*arguments: str) -> int:
        try:
            return __main__.main(list(arguments))
        except SystemExit as stop:
            return int(stop.code or 0)

    return lm


@pytest.fixture
def fit(lm: Run, dataset: Path) -> Run:
    return lambda *arguments: lm("fit", f"--data.directory={dataset}", *SETTINGS, *arguments)


# -------------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_command_and_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, lm.__main__ as m; m.main(['--help']);"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'lightning', 'numba', 'jsonargparse')))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("fit", "validate", "generate", "serve", "prepare", "account", "bench", "sweep", "report", "export"):
        assert f"\n  {name} " in done.stdout


def test_help_that_nobody_reads_is_no_error() -> None:
    words = ["bash", "-o", "pipefail", "-c", f"{shlex.join(command('--help'))} | true"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_cannot_be_written_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    words = ["bash", "-c", f"{shlex.join(command('--help'))} > /dev/full"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device\n", done.stderr)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_help_of_training_is_the_projects_own(lm: Run, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert lm(command, "--help") == 0
    shown = capfd.readouterr().out
    assert shown.startswith(f"usage: python -m lm {command} [--config FILE] [--OPTION VALUE]\n\n")
    sections = [shown.index(f"\n  --{option}") for option in ("run.name", "data.corpus", "model.compile", "trainer.")]
    assert sections == sorted(sections)
    assert [name for name in TRAINER_OPTIONS if f"--trainer.{name}" not in shown] == []
    # Neither what a run has no use for, nor what follows from another option, nor Python's words.
    words = ("barebones", "sync_batchnorm", "-->", "class_path", "Union[", "``", "--weights_only", "--model CONFIG")
    assert [word for word in words if word in shown] == []


@pytest.mark.parametrize(
    ("main", "words"), [(__main__.main, ["fit"]), (tokenizer_main, ["decode", "--tokenizer", "x", "1"])]
)
def test_windows_is_told_where_it_runs(
    main: Callable[[list[str]], int],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    code = main(words)
    monkeypatch.undo()
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "WSL2" in err


def test_an_interrupt_while_libraries_are_imported_ends_the_process_and_nothing_else() -> None:
    before = signal.getsignal(signal.SIGINT)
    with __main__.importing():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
    with contextlib.suppress(ZeroDivisionError), __main__.importing():
        print(1 / 0)
    assert signal.getsignal(signal.SIGINT) == before


def test_every_tool_that_is_listed_is_there() -> None:
    import importlib

    for name, (place, _) in __main__.TOOLS.items():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name


@pytest.mark.parametrize(
    ("tool", "option"), [pytest.param("generate", "--max_new_tokens", marks=pytest.mark.slow), ("serve", "--port")]
)
def test_a_tool_starts_without_lightning(tool: str, option: str) -> None:
    program = (
        "import sys, lm.__main__ as m\n"
        f"try: m.main(['{tool}', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('lightning' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "'fitt' is no command: did you mean fit?"),
        (["fit", "--model.optimzer.lr", "3"], "--model.optimzer.lr is no option: did you mean --model.optimizer.lr?"),
        (["fit", "--model.transformer.norm=prex"], "model.transformer.norm: 'prex' must be one of pre, post, none"),
        (["fit", "--model.optimizer.lr=fast"], "model.optimizer.lr: 'fast' must be float"),
        (["fit", "--trainer.precision=bf17"], "did you mean bf16?"),
        (["fit", "--config=absent.yaml"], "config: File does not exist: "),
        (["fit", "--config=."], "config: Path is not a file: "),
        (["fit", "--lr", "3"], "--lr is no option: did you mean --model.optimizer.lr?"),
        (["fit", "--trainer.max_step=5"], "--trainer.max_step is no option: did you mean --trainer.max_steps?"),
        (["fit", "--model.optimizer.betas=0.9,0.95"], "betas: '0.9,0.95' must be a list, with brackets: '[0.9,0.95]'"),
        (["fit", "--trainer.val_check_interval=3"], "follows from --run.validate_every_n_steps: set that instead"),
        (["fit", "--data.special_tokens=<x>"], "data.special_tokens: '<x>' must be a list, with brackets: '[<x>]'"),
        (["fit", "--seed_everything=true"], "seed_everything: 'True' must be int"),
        (["fit", "--seed_everything=-1"], "seed_everything=-1 must be from 0 to 4294967295"),
        (["fit", "--data.batch_size=0"], "data.batch_size=0 must be at least 1"),
        (["fit", "--data.train_text=."], "data.train_text: . has no texts in it, that is, files that end"),
        (["validate", "--data.batchsize=2", "--ckpt_path=x"], "did you mean --data.batch_size?"),
        (["validate"], "no run with a checkpoint below logs: `python -m lm fit` makes one"),
        (["validate", "--ckpt_path=absent.ckpt"], "ckpt_path: there is no file absent.ckpt"),
        (["validate", "--ckpt_path=."], "no checkpoint in ."),
        (["fit", "--data.vocab_size=0"], "vocab_size=0 must be positive"),
        (["fit", "--ckpt_path=absent.ckpt"], "ckpt_path: there is no file absent.ckpt"),
        (["generate", "--promt", "x"], "--promt is no option: did you mean --prompt?"),
        (["generate", "--temperature", "hot"], "temperature: 'hot' must be float"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_with_a_suggestion(
    lm: Run, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert lm(*arguments) == 2
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "nope.yaml"], "nope.yaml: there is no such file"),
        (["sweep", "folder"], "folder is a folder, not a file"),
        (["generate", "Once", "upon", "--seed=3"], 'put the prompt in quotes: --prompt "Once upon"'),
        (["generate", "--prompt=a", "--prompt", "b"], "--prompt is there more than once: give it one value"),
        (["generate", "a", "--prompt=b"], "--prompt is there more than once: give it one value"),
        (["account", "gpt2", "owt"], "'owt' is one word too many: a value with blanks in it goes in quotes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_with_a_tools_words_is_said_in_words(
    lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "folder").mkdir()
    assert lm(*arguments) == 2
    assert capfd.readouterr().err == f"error: {message}\n"


def test_a_profile_is_in_the_runs_folder(fit: Run, tmp_path: Path) -> None:
    assert fit("--trainer.profiler=simple", "--run.name=r") == 0
    assert "optimizer_step" in (tmp_path / "logs/r/version_0/fit-profile.txt").read_text()


def test_prompts_that_cannot_be_read_are_named(fit: Run, lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    capfd.readouterr()
    for name, message in (("nope", "nope: there is no such file"), ("logs", "logs is a folder, not a file")):
        assert lm("generate", "--prompts", name) == 2
        assert capfd.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("tool", "usage", "types"),
    [
        ("account", "account [[--model] MODEL] [options]", ["(type: scratch | fused | null, default: null)"]),
        ("serve", "serve [[--ckpt] CKPT] [options]", ["(type: Path, default: logs)"]),
        ("import", "", ["(required, type: Path)", "(required, type: hf)"]),
    ],
)
def test_a_tools_help_is_in_plain_words(
    lm: Run, capfd: pytest.CaptureFixture[str], tool: str, usage: str, types: list[str]
) -> None:
    assert lm(tool, "--help") == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert usage in shown
    assert [name for name in types if name not in shown] == []
    assert not [name for name in ("<class", "Literal[", "Optional[") if name in shown]


def test_a_misspelt_key_of_a_file_is_named(lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("model: {optimizer: {learning_rate: 3}}\n")
    assert lm("fit", "--config=my.yaml") == 2
    assert "--model.optimizer.learning_rate is no option: did you mean" in capfd.readouterr().err


@pytest.mark.parametrize("option", [["--config=my.yaml"], ["--config", "my.yaml"], ["-c", "my.yaml"]])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"trainer: {max_steps: 3}\ndata: {seed: 1}\ntrainer: {log_every_n_steps: 1}\n",
            "my.yaml, line 3: 'trainer' is given twice (first in line 1)",
        ),
        (
            b"trainer:\n  max_steps: 3\n  max_steps: 4\n",
            "my.yaml, line 3: 'max_steps' is given twice (first in line 2)",
        ),
        (b"trainer:\n\tmax_steps: 3\n", "my.yaml, line 2: no valid YAML: found character '\\t' that cannot start"),
        (b"\xff\x80", "my.yaml: no valid YAML: 'utf-8' codec can't decode"),
        (b"- trainer\n", "my.yaml: a mapping of settings is wanted (`name: value`), not a list"),
        (b"trainer: 5\n", "my.yaml: `trainer` must be a mapping of settings (`name: value`), not 5"),
        (b"model:\n  optimizer:\n", "my.yaml: `optimizer` must be a mapping of settings (`name: value`), not empty"),
    ],
)
def test_a_broken_configuration_is_one_line_with_its_file(
    lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], option: list[str], content: bytes, message: str
) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    assert lm("fit", *option) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"error: {message}")


def test_all_that_is_wrong_is_said_at_once_before_any_data_is_touched(
    lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    settings = {
        "model.transformer.num_heads=3": "num_heads=3 must divide d_model=128",
        "model.optimizer.lr=-1": "lr=-1.0 must be positive",
        "model.schedule.warmup_steps=5000": "warmup_steps=5000 must be less than trainer.max_steps=",
        "trainer.accelerator=mps": "trainer.accelerator=mps: this machine has none",
        "trainer.precision=16-mixed": "trainer.precision=16-mixed needs a GPU",
        "data.train_text=absent.txt": "data.train_text: there is no file absent.txt",
        "data.val_context_length=512": "data.val_context_length=512 is longer than data.context_length=256",
        "model.compile=reduce-overhead": "model.compile=reduce-overhead with trainer.accumulate_grad_batches=2",
        "run.logs=file/logs": "file/logs",
    }
    assert lm("fit", "--trainer.accumulate_grad_batches=2", *(f"--{setting}" for setting in settings)) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == len(settings)
    for message in settings.values():
        assert any(line.startswith("error: ") and message in line for line in said), message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_steps=-1", "--run.max_minutes=null"], "the run would never end"),
        (["--trainer.max_steps=-1", "--run.max_minutes=1"], "follow=steps needs trainer.max_steps"),
        (["--model.schedule.follow=clock", "--run.max_minutes=null"], "follow=clock needs run.max_minutes"),
        (["--model.transformer.d_model=6"], "heads of odd length 3"),
        (
            ["--model.transformer.position=none", "--data.val_context_length=32"],
            "is longer than data.context_length=16",
        ),
        (["--trainer.gradient_clip_algorithm=value"], "only the norm of all gradients can be clipped"),
        (["--model.optimizer.head_lr=0.1", "--model.transformer.head=tied"], "head=tied has none of its own"),
        (["--model.optimizer.matrices=muon", "--trainer.strategy=fsdp2"], "muon needs whole matrices"),
        (["--run.max_minutes=1", "--trainer.num_sanity_val_steps=0"], "num_sanity_val_steps=0 with run.max_minutes"),
        (["--trainer.logger=false"], "the run's folder is its logger's"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1 must be above 0, or 0 for no clipping"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs=0: the run would end before its first update"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches=0: the run would end before its first"),
        (
            ["--trainer.max_steps=0", "--model.schedule.follow=clock", "--run.max_minutes=1"],
            "trainer.max_steps=0 must be at least 1, or -1 to be ended by the clock",
        ),
        (["--trainer.max_steps=-5"], "trainer.max_steps=-5 must be at least 1, or -1 to be ended by the clock"),
        (["--trainer.barebones=true"], "trainer.barebones=true: it would leave out checkpoints"),
        (["--trainer.strategy=foo"], "trainer.strategy=foo: use one of auto, ddp, fsdp2"),
        (["--run.name=../toy"], "run: name='../toy' must be a name, not a path"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0 must be at least 1"),
        (["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=0 must be at least 1"),
        (["--trainer.overfit_batches=2"], "trainer.overfit_batches=2: train on a short text"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator=tpu: use auto, cpu, cuda or mps"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_before_the_run_has_a_folder(
    fit: Run, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert fit(*arguments) == 2
    said = capfd.readouterr().err
    assert message in said
    assert all(line.startswith("error: ") for line in said.splitlines())
    assert not RUN.exists()


def test_a_text_shorter_than_a_window_is_refused(fit: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("--data.context_length=100000") == 2
    said = capfd.readouterr().err
    assert "needs at least 100001" in said
    assert "Traceback" not in said
    assert not RUN.exists()


def test_what_is_no_checkpoint_is_said_before_any_data_is_touched(
    lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("a text")
    assert lm("validate", "--ckpt_path=some.txt") == 2
    assert capfd.readouterr().err.startswith("error: ckpt_path: some.txt (6 bytes) is no whole checkpoint file")
    assert not (tmp_path / "data").exists()


def test_a_parsers_other_messages_become_one_line() -> None:
    assert explain("Problems parsing config:\n  line 1\n  line 2", []) == "Problems parsing config: line 1 line 2"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_says_which_batch_to_try(
    fit: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("lm.module.LanguageModel.training_step", fail)
    assert fit() == 1
    assert "--data.batch_size 2 --trainer.accumulate_grad_batches 2 (the same updates)" in capfd.readouterr().err


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_float32_products_are_made_as_matmul_precision_says(
    fit: Run, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    before = torch.get_float32_matmul_precision()
    seen = []

    def look(*_: Any) -> None:
        seen.append(torch.get_float32_matmul_precision())
        raise KeyboardInterrupt

    monkeypatch.setattr("lm.module.LanguageModel.training_step", look)
    try:
        fit(f"--matmul_precision={precision}")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [precision]


# --------------------------------------------------------------------------------------------------- bare and resumed


def test_validate_alone_takes_the_best_checkpoint_of_the_newest_run_as_it_was_made(
    fit: Run, lm: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit("--run.name=old") == 0
    assert fit("--model.transformer.d_model=24", "--model.transformer.norm=post") == 0
    before = sorted(path for path in Path("logs").rglob("*"))
    capfd.readouterr()
    assert lm("validate") == 0
    said = capfd.readouterr().out
    best = best_checkpoint(RUN)
    assert str(best) in said
    loss = json.loads(best.with_suffix(".json").read_text())["metrics"]["val/loss"]
    assert f"loss {loss:.4f} nats per token" in said
    assert sorted(path for path in Path("logs").rglob("*")) == before, "validation leaves no files"
    assert lm("validate", f"--ckpt_path={RUN}") == 0
    assert f"{best}\nloss {loss:.4f} nats per token" in capfd.readouterr().out, "a run's folder stands for it"
    assert lm("validate", "--data.val_batch_size=2", "--data.val_context_length=8") == 0
    assert f"loss {loss:.4f} nats" not in capfd.readouterr().out, "what is typed wins over the run's configuration"


def test_the_commands_named_at_the_end_find_a_run_kept_elsewhere(
    fit: Run, lm: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit("--run.logs=some where") == 0
    named = [line.strip().split("   ")[0] for line in capfd.readouterr().out.splitlines() if "python -m lm" in line]
    generate, validate, _ = [shlex.split(words)[3:] for words in named]
    assert lm(*generate) == 0
    assert lm(*validate) == 0
    assert "some where/toy/version_0" in capfd.readouterr().out


def test_the_saved_configuration_makes_the_same_run_again(fit: Run, lm: Run) -> None:
    from toy import rows

    assert fit("--model.transformer.norm=post", "--seed_everything=5") == 0
    assert lm("fit", f"--config={RUN / 'config.yaml'}", "--run.name=again") == 0
    assert rows(Path("logs/again/version_0")) == rows(RUN)


def test_a_run_goes_on_and_is_validated_without_its_text(lm: Run, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("the cat sat on a mat.\n" * 3000)
    settings = [setting for setting in SETTINGS if "name" not in setting]
    assert lm("fit", *settings, f"--data.train_text={text}", "--data.vocab_size=300") == 0
    text.rename(tmp_path / "other.txt")
    assert lm("validate") == 0
    assert lm("validate", "--data.valid_text=other.txt") == 0
    assert lm("fit", "--config=logs/my/version_0/config.yaml") == 0


def test_a_run_is_validated_on_any_text(
    fit: Run, lm: Run, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    capfd.readouterr()
    assert lm("validate") == 0
    own = capfd.readouterr().out
    ids = np.load(dataset / "valid.npy")
    (tmp_path / "same.txt").write_bytes(bytes((ids - 1).astype(np.uint8)))
    (tmp_path / "other.txt").write_text("zebras quarrel\n" * 50)
    assert lm("validate", "--data.valid_text=same.txt") == 0
    assert capfd.readouterr().out == own
    for _ in range(2):  # the second time it is encoded already
        assert lm("validate", "--data.valid_text", "other.txt") == 0
        other = capfd.readouterr()
        assert other.out != own
    assert other.err == ""
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.txt").rename(tmp_path / "folder" / "other.md")
    (tmp_path / "other.jsonl").write_text('{"text": "zebras quarrel"}\n' * 50)
    for text in ("folder", "other.jsonl"):
        assert lm("validate", f"--data.valid_text={text}") == 0
        assert "bits per byte" in capfd.readouterr().out
    assert lm("validate", "--data.valid_text=none.txt") == 2
    assert capfd.readouterr().err == "error: data.valid_text: there is no file none.txt\n"


def test_a_run_is_trained_on_a_folder_and_named_after_it(
    lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    for i in range(30):
        (tmp_path / "notes" / f"{i:02}.md").write_text("the cat sat on a mat.\n" * 100)
    settings = [setting for setting in SETTINGS if "name" not in setting]
    for run in range(2):
        assert lm("fit", *settings, "--data.train_text=notes/", "--data.vocab_size=300") == 0
        assert (tmp_path / f"logs/notes/version_{run}/checkpoints").is_dir()
        assert ("prepare: gathering 30 files of notes/; no valid_text" in capfd.readouterr().err) == (run == 0)


def test_what_is_typed_about_the_data_wins_over_a_runs_configuration(
    fit: Run, lm: Run, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    text = tmp_path / "new.txt"
    text.write_text("the cat sat on a mat.\n" * 3000)
    again = ("fit", f"--config={RUN}/config.yaml", "--run.name=new", "--data.vocab_size=300")
    capfd.readouterr()
    assert lm(*again, f"--data.train_text={text}") == 0
    assert "\ndata  data/new: " in capfd.readouterr().out
    assert lm(*again, f"--data.train_text={text}", f"--data.directory={dataset}") == 2
    assert "one dataset is enough" in capfd.readouterr().err
    assert fit("--data.tokenizer=mine") == 2
    assert "data.directory and data.tokenizer: a prepared dataset has its own" in capfd.readouterr().err
    assert lm("validate", f"--data.train_text={text}") == 2
    assert "to validate on another text use --data.valid_text" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ({"train_text"}, ("a.txt", None)),
        ({"train_text", "valid_text"}, ("a.txt", "b.txt")),
        ({"corpus"}, (None, None)),
    ],
)
def test_what_is_typed_takes_the_place_of_both_texts_of_a_configuration(
    typed: set[str], left: tuple[str | None, str | None]
) -> None:
    data = Namespace(directory="data/x", train_text="a.txt", valid_text="b.txt")
    assert choose_data(data, typed, "fit") == []
    assert (data.directory, data.train_text, data.valid_text) == (None, *left)


def test_of_an_option_given_several_times_the_last_counts_and_no_longer_name_is_taken_for_it() -> None:
    argv = ["fit", "--run.name=a", "--run.names=b", "--run.name", "c", "--run.name"]
    assert options(argv, "--run.name") == ["a", "c", ""]
    assert option(argv[:-1], "--run.name") == "c"
    assert option(argv, "--run") is None


def test_a_dataset_without_a_tokenizer_leaves_no_run(
    lm: Run, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    assert lm("fit", "--data.directory=bare", *SETTINGS) == 2
    assert "`cp -r TOKENIZER bare/tokenizer`" in capfd.readouterr().err
    assert not any(Path("logs").glob("*"))


def test_a_run_is_validated_with_what_it_was_last_gone_on_with(
    fit: Run, lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit("--run.keep_checkpoints=9") == 0
    assert fit("--resume=must", "--trainer.max_steps=12", "--data.val_context_length=8") == 0
    assert fit("--resume=must", "--trainer.max_steps=16", "--model.transformer.norm=post") == 2, "and leaves no trace"
    newest = RUN / "checkpoints/step-000012"
    (tmp_path / "newest.ckpt").symlink_to(tmp_path / newest.with_suffix(".ckpt"))
    loss = json.loads(newest.with_suffix(".json").read_text())["metrics"]["val/loss"]
    capfd.readouterr()
    for name in (newest.with_suffix(".ckpt"), "newest.ckpt"):
        assert lm("validate", f"--ckpt_path={name}") == 0
        assert f"loss {loss:.4f} nats per token" in capfd.readouterr().out


def test_a_checkpoint_without_a_configuration_needs_one(
    fit: Run, lm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    config, alone = RUN / "config.yaml", tmp_path / "alone.ckpt"
    shutil.copy(RUN / "checkpoints/step-000008.ckpt", alone)
    capfd.readouterr()
    assert lm("validate", f"--ckpt_path={alone}") == 2
    said = f"error: no config.yaml beside {alone}: say with --config what to validate it with\n"
    assert capfd.readouterr().err == said
    assert lm("validate", f"--ckpt_path={alone}", f"--config={config}") == 0
    config.unlink()
    assert lm("validate") == 2
    assert not Path("data").exists(), "no corpus was prepared that nobody asked for"


def test_a_runs_configuration_is_there_whole_or_not_at_all(fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def fail(part: Any, target: Any) -> None:
        if Path(target).name == "config.yaml":
            raise OSError(5, "Input/output error")
        replace(part, target)

    monkeypatch.setattr(os, "replace", fail)
    assert fit() == 2
    assert [path.name for path in RUN.glob("*config.yaml*")] == []


def test_the_bar_can_be_left_out(fit: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.enable_progress_bar=false") == 0
    assert "tokens/s" not in capfd.readouterr().err


def test_a_reader_that_has_seen_enough_does_not_end_a_run(dataset: Path, tmp_path: Path) -> None:
    words = shlex.join(command("fit", f"--data.directory={dataset}", *SETTINGS))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{words} 2>&1 | head -1"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["status"] == "finished"


def test_a_terminal_that_lacks_a_character_does_not_end_a_run(fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert fit("--run.sample_prompt=né") == 0
    assert b"sample:\n  n?" in shown.getvalue()


def test_a_copy_beside_a_run_is_not_resumed(fit: Run) -> None:
    assert fit() == 0
    shutil.copytree(RUN, RUN.with_name("version_0-old"))
    assert fit("--resume=must", "--trainer.max_steps=10") == 0
    assert [folder for folder in sorted(RUN.parent.iterdir()) if list(folder.rglob("step-000010.ckpt"))] == [RUN]


def test_a_checkpoint_given_by_name_begins_a_run_of_its_own(fit: Run, lm: Run) -> None:
    assert fit() == 0
    checkpoint = RUN / "checkpoints/step-000004.ckpt"
    assert lm("fit", f"--ckpt_path={checkpoint}", "--run.name=branch", "--trainer.max_steps=6") == 0
    from toy import rows

    assert [row["step"] for row in rows(Path("logs/branch/version_0")) if "lr" in row] == [5, 6]


def test_devices_are_counted_as_lightning_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [num_devices(devices) for devices in (2, "2", "auto", -1, [0, 1, 2], "0,2", "0,")] == [2, 2, 4, 4, 3, 2, 1]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [num_devices(devices) for devices in ("auto", -1)] == [1, 1], "the processor"


def test_several_devices_on_whatever_nodes_need_a_strategy_with_the_runs_timeout() -> None:
    def strategy(name: str, devices: int = 1, num_nodes: int = 1) -> Any:
        return make_strategy(Namespace(strategy=name, devices=devices, num_nodes=num_nodes), timedelta(minutes=3))

    assert strategy("auto") == "auto"
    for made in (strategy("ddp"), strategy("auto", 2), strategy("auto", 1, 2), strategy("fsdp2", 2, 3)):
        assert made._timeout == timedelta(minutes=3)
    assert strategy("fsdp2", 2, 3)._data_parallel_size == 6


def test_of_several_ranks_the_one_that_failed_is_named_once_it_has() -> None:
    def rank(*exit_codes: int | None) -> Any:
        return MagicMock(subprocess.Popen, poll=MagicMock(side_effect=exit_codes), returncode=exit_codes[-1])

    assert find_culprit([rank(0), rank(None)]) is None
    assert "rank 3 ended with exit code 7" in str(find_culprit([rank(0), rank(None), rank(7)]))
    assert "rank 1 ended with exit code 7" in str(find_culprit([rank(None, None, 7)], patience=60.0))


def test_a_rank_ends_when_the_process_that_started_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    parents, naps = iter([7, 7, 1]), iter(range(3))
    monkeypatch.setattr("lm.ranks.os", SimpleNamespace(getppid=lambda: next(parents), _exit=leave))
    monkeypatch.setattr("lm.ranks.time", SimpleNamespace(sleep=lambda seconds: next(naps)))
    with pytest.raises(SystemExit, match="1"):
        end_with(7)
    assert next(naps) == 2, "it looked twice in vain"


def test_one_callback_needs_no_list(fit: Run) -> None:
    assert fit("--trainer.callbacks=lightning.pytorch.callbacks.LearningRateMonitor", "--trainer.max_steps=3") == 0


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"directory": "data/my.book", "train_text": None}, "my.book"),
        ({"directory": None, "train_text": "texts/my.book.txt.gz"}, "my.book"),
        ({"directory": None, "train_text": "texts/my.book.jsonl"}, "my.book"),
        ({"directory": None, "train_text": None}, "owt"),
    ],
)
def test_a_run_is_named_after_its_dataset(data: dict[str, str | None], name: str) -> None:
    assert default_run_name(Namespace(corpus="owt", **data)) == name


def test_a_trial_run_writes_nothing(fit: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.fast_dev_run=true") == 0
    assert "went through" in capfd.readouterr().out
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_float16_weights_are_refused_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (problem,) = device_problems(Namespace(accelerator="auto", devices=1, precision="16-true"))
    assert problem.startswith("trainer.precision=16-true cannot train")
    assert not device_problems(Namespace(accelerator="auto", devices=1, precision="16-mixed"))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert is_first_rank()
    monkeypatch.setenv(name, "0")
    assert is_first_rank()
    monkeypatch.setenv(name, "1")
    assert not is_first_rank()


def test_a_rank_is_a_number(lm: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "")
    assert lm("no such command") == 2
    assert "LOCAL_RANK" not in os.environ
    capsys.readouterr()
    monkeypatch.setenv("RANK", "abc")
    assert lm("fit") == 2
    assert capsys.readouterr().err == "error: RANK='abc' is no rank: `unset RANK`, or see what sets it\n"


# ---------------------------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "launcher"), [("ddp", "lightning"), ("fsdp2", "torchrun")])
def test_two_processes_are_one_with_twice_the_batch(
    fit: Run, dataset: Path, strategy: str, launcher: str, tmp_path: Path
) -> None:
    from toy import rows

    assert fit("--run.name=one", "--data.batch_size=8") == 0
    arguments = [f"--data.directory={dataset}", *SETTINGS, "--run.name=two", "--trainer.devices=2"]
    words = command("fit", *arguments, f"--trainer.strategy={strategy}")
    if launcher == "torchrun":
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = rows(Path("logs/one/version_0")), rows(Path("logs/two/version_0"))
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], abs=1e-4), name
    assert fit("--run.name=two", "--data.batch_size=8", "--resume=must", "--trainer.max_steps=10") == 0
    assert rows(Path("logs/two/version_0"))[-1]["step"] == 10, "its checkpoint loads in one process"


def test_processes_that_would_each_make_a_run_of_their_own_are_refused(
    fit: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def problems(devices: int, num_nodes: int = 1, **environment: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return process_problems(Namespace(devices=devices, num_nodes=num_nodes))

    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert fit() == 2
    said = "error: trainer.devices=1: torchrun has started 2 processes, and each would make a run of its own; use "
    assert capfd.readouterr().err == f"{said}--trainer.devices 2\n"
    for name in torchrun:
        monkeypatch.delenv(name)
    [line] = problems(2, **torchrun | {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"})
    assert line.endswith("use --trainer.devices 2 --trainer.num_nodes 2")
    step = {"SLURM_JOB_NAME": "train", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    [line] = problems(1, **step)
    assert "srun has started 2 processes" in line
    script = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}  # without srun: one process
    matching = problems(2, **torchrun) + problems(2, **step) + problems(1, 2, **step | {"SLURM_STEP_NUM_NODES": "2"})
    assert matching + problems(1, **script) + problems(1, **step | {"SLURM_JOB_NAME": "interactive"}) == []


def test_a_tools_first_option_needs_no_name_and_a_switch_no_value() -> None:
    def required(file: str, dry_run: bool = False) -> None: ...

    def optional(model: str = "gpt2-xl", json: bool = False, logs: str = "logs") -> None: ...

    assert __main__.spelled_out(required, ["a.yaml", "--dry_run"]) == ["a.yaml", "--dry_run=true"]
    assert __main__.spelled_out(optional, ["gpt2", "--json", "false"]) == ["--model=gpt2", "--json", "false"]
    assert __main__.spelled_out(optional, ["--json", "--logs", "x"]) == ["--json=true", "--logs", "x"]
    assert __main__.spelled_out(optional, []) == []


def test_a_tool_without_its_argument_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["prepare"])
    assert "corpus" in capsys.readouterr().err
