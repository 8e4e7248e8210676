"""How runs end: on time, on signals, on numbers that are not finite; and what they leave behind."""

import itertools
import json
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Trainer
from toy import SETTINGS, make_dataset, rows

from lm import callbacks, cli, control
from lm.control import Clock, RunConfig, RunControl, Signals, Stopped, requeue_job
from lm.model import TransformerConfig
from lm.module import LanguageModel

Fit = Callable[..., int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def fit(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """`python -m lm fit` in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])

    def fit(*arguments: str, started: float | None = None) -> int:
        began = time.monotonic() if started is None else started
        return cli.main(["fit", f"--data.directory={dataset}", *SETTINGS, *arguments], began)

    return fit


RUN = Path("logs/toy/version_0")


def summary() -> dict[str, Any]:
    return json.loads((RUN / "summary.json").read_text())


def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[Any], None]) -> None:
    """Let something happen whenever a method, or a module's function, is called, before it."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any) -> Any:
        action(self)
        return original(self, *args)

    monkeypatch.setattr(owner, name, method)


# ------------------------------------------------------------------------------------------------------------- clock


def test_the_time_agreed_on_includes_the_steps_that_the_device_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(seconds=1.0)

    def wait() -> bool:
        clock.seconds += 5
        return False

    monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    run, module = RunControl(RunConfig(), started=0.0), LanguageModel(TransformerConfig(vocab_size=257))
    module.nonfinite = SimpleNamespace(item=wait)  # type: ignore[assignment]
    run._synchronise(Trainer(accelerator="cpu", logger=False, max_steps=1), module, 1)
    assert run.clock.at(1) == 6.0


def test_between_agreements_the_clock_goes_by_steps_alone() -> None:
    clock = Clock(started=0.0)
    clock.agree(10, 100.0, 0.0)
    clock.agree(20, 150.0, 30.0)
    assert clock.step_seconds == 2.0, "a pause is no part of a step"
    assert [clock.at(step) for step in (20, 21, 25)] == [150.0, 152.0, 160.0]
    clock.previous = 1e9
    assert clock.now() > 1e9


@pytest.mark.parametrize(("world_size", "device", "every"), [(1, "cpu", 1), (2, "cpu", 3), (1, "cuda", 3)])
def test_one_process_on_a_cpu_need_not_wait_for_anyone(
    monkeypatch: pytest.MonkeyPatch, world_size: int, device: str, every: int
) -> None:
    monkeypatch.setattr(Trainer, "world_size", world_size)
    monkeypatch.setattr(Trainer, "strategy", SimpleNamespace(root_device=torch.device(device)))
    trainer = object.__new__(Trainer)
    assert RunControl(RunConfig(sync_every_n_steps=3), started=0.0)._sync_every(trainer) == every


def test_the_ranks_agree_as_seldom_as_the_setting_says(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    agreed = []
    before(monkeypatch, control.Clock, "agree", lambda _: agreed.append(len(steps)))
    steps: list[None] = []
    before(monkeypatch, LanguageModel, "training_step", lambda _: steps.append(None))
    monkeypatch.setattr(RunControl, "_sync_every", lambda self, _: self.config.sync_every_n_steps)
    settings = ["--run.validate_every_n_steps=1000", "--run.sync_every_n_steps=5", "--trainer.max_steps=12"]
    assert fit(*settings) == 0
    assert sorted({step for step in agreed if step > 1}) == [5, 10, 12]


class SlowMachine:
    """A clock that goes by what is done alone: a step, a batch of validation, ... take what they are told."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step: float, validation: float, save: float, sample: float
    ) -> None:
        self.now = 100.0
        monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=lambda: self.now))
        for owner, name, seconds in (
            (LanguageModel, "training_step", step),
            (LanguageModel, "validation_step", validation),
            (RunControl, "on_save_checkpoint", save),
            (callbacks, "generate", sample),
        ):
            before(monkeypatch, owner, name, lambda _, seconds=seconds: self.wait(seconds))

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("follow", "shape"), [("clock", "cosine"), ("clock", "trapezoid"), ("steps", "cosine")])
@pytest.mark.parametrize("step_seconds", [0.1, 0.5])
def test_a_run_ends_in_time_with_slow_validation_text_and_saving(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, follow: str, shape: str, step_seconds: float
) -> None:
    machine = SlowMachine(monkeypatch, step_seconds, validation=0.1, save=0.3, sample=0.4)  # a validation has 6 batches
    arguments = [f"--model.schedule.follow={follow}", f"--model.schedule.shape={shape}", "--data.val_batch_size=4"]
    arguments += ["--trainer.max_steps=100000"]
    assert fit(*arguments, "--run.max_minutes=0.2", "--run.validate_every_n_steps=1000", started=95.0) == 0
    used, last = machine.now - 95, summary()
    assert last["status"] == "finished"
    assert last["budget_seconds"] == 12.0
    assert last["used_seconds"] == pytest.approx(used)
    assert last["reserve_seconds"] == pytest.approx(1 + 1.25 * (0.6 + 0.3 + 0.4))
    assert 12 - last["reserve_seconds"] - step_seconds < used - 1.3 <= 12 - last["reserve_seconds"]
    assert last["val_loss"] is not None
    assert rows(RUN)[-1]["step"] == last["steps"], "the last row is a validation of the last step"
    assert (RUN / f"checkpoints/step-{last['steps']:06d}.ckpt").is_file()
    lowest = 0.02 * 5e-3
    rates = [row["lr"] for row in rows(RUN) if "lr" in row]
    assert rates[-1] == pytest.approx(lowest) if follow == "clock" else rates[-1] > 10 * lowest
    if shape == "trapezoid":
        highest = sum(rate == pytest.approx(5e-3) for rate in rates)
        assert highest == pytest.approx(0.7 * len(rates) - 1, abs=1), "the start of the process takes nothing from it"


def test_what_is_compiled_for_the_first_batch_does_not_count_as_a_validations_time(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 of 60 seconds, and each of 6 batches would take as long; then the first whole validation compiles more."""
    machine, compiled = SlowMachine(monkeypatch, 0.1, validation=0.1, save=0.3, sample=0.4), [3.0, 30.0]

    def compile_something(module: Any) -> None:
        if compiled and module.trainer.sanity_checking == (len(compiled) == 2):
            machine.wait(compiled.pop())

    before(monkeypatch, LanguageModel, "validation_step", compile_something)
    arguments = ["--trainer.max_steps=100000", "--data.val_batch_size=4", "--run.max_minutes=1"]
    assert fit(*arguments, "--run.validate_every_n_steps=40", started=95.0) == 0
    assert summary()["steps"] > 50
    assert summary()["reserve_seconds"] == pytest.approx(1 + 1.25 * (0.6 + 0.3 + 0.4))
    assert machine.now - 95 < 60


def test_a_run_without_an_update_has_no_figures(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run.max_minutes=0.001") == 0
    assert summary()["validation"] == {} and summary()["steps"] == 0
    assert "validation: loss" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "ending", [["--trainer.max_time=00:00:00:03"], ["--trainer.max_epochs=1", "--trainer.limit_train_batches=6"]]
)
def test_a_run_that_something_else_ends_is_saved_and_validated(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, ending: list[str]
) -> None:
    def slowly(module: Any) -> None:
        time.sleep(0.01)

    before(monkeypatch, LanguageModel, "training_step", slowly)
    assert fit(*ending, "--trainer.max_steps=100000") == 0
    last = summary()
    assert last["steps"] > 4
    checkpoint = RUN / f"checkpoints/step-{last['steps']:06d}"
    assert checkpoint.with_suffix(".ckpt").is_file()
    measured = {row["step"]: row["val/loss"] for row in rows(RUN) if "val/loss" in row}
    for record in (RUN / "checkpoints").glob("*.json"):
        noted = json.loads(record.read_text())
        assert noted["metrics"]["val/loss"] == measured[noted["step"]], "each its own loss"
    assert last["val_loss"] == measured[last["steps"]]


def test_an_overflow_that_a_scaler_of_float16_provokes_is_no_divergence(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    made, scaler = cli.CLI.instantiate_trainer, torch.amp.GradScaler("cpu", growth_interval=2)

    def with_scaler(self: Any, **kwargs: Any) -> Any:
        self._get(self.config_init, "trainer").plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        return made(self, **kwargs)

    monkeypatch.setattr(cli.CLI, "instantiate_trainer", with_scaler)
    scales = []
    before(monkeypatch, LanguageModel, "training_step", lambda _: scales.append(scaler.get_scale()))
    assert fit("--trainer.max_steps=60", "--run.validate_every_n_steps=30") == 0
    assert any(b < a for a, b in itertools.pairwise(scales)), "an update was left out"
    assert summary()["val_loss"] < 5.5


def test_the_samples_tokenizer_is_the_one_that_the_run_began_with(
    fit: Fit, dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A corpus may be prepared anew, with another vocabulary, while a run trains on what it has opened."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)

    before(monkeypatch, LanguageModel, "training_step", lambda _: shutil.rmtree(data / "tokenizer", ignore_errors=True))
    assert fit(f"--data.directory={data}") == 0
    assert not (data / "tokenizer").exists()


@pytest.mark.parametrize(("limit", "longer"), [(12, 0.0), (15, 0.5)])
def test_a_run_that_its_clock_ends_at_a_validation_does_not_repeat_it_a_step_later(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, limit: int, longer: float
) -> None:
    """Foreseen, with the lowest rate in the last update; or because this validation takes longer than any before."""
    machine = SlowMachine(monkeypatch, 0.1, validation=0.1, save=0.3, sample=0.4)

    def take_longer(module: Any) -> None:
        if module.trainer.global_step == 20:
            machine.wait(longer)

    before(monkeypatch, LanguageModel, "validation_step", take_longer)
    arguments = ["--trainer.max_steps=100000", "--data.val_batch_size=4", f"--run.max_minutes={limit / 60}"]
    arguments += ["--run.validate_every_n_steps=20", "--model.schedule.follow=clock"]
    assert fit(*arguments, started=95.0) == 0
    assert [row["step"] for row in rows(RUN) if "val/loss" in row] == [20]
    assert summary()["steps"] == 20
    assert machine.now - 95 < limit
    if not longer:
        assert [row["lr"] for row in rows(RUN) if "lr" in row][-1] == pytest.approx(0.02 * 5e-3)


@pytest.mark.slow
def test_a_resumed_run_ends_in_time_at_the_lowest_rate(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowMachine(monkeypatch, step=0.2, validation=0.1, save=0.3, sample=0.4)
    arguments = ["--model.schedule.follow=clock", "--trainer.max_steps=100000", "--data.val_batch_size=4"]
    arguments += ["--run.max_minutes=0.5", "--run.validate_every_n_steps=1000", "--resume=auto"]

    def after_a_third(module: Any) -> None:
        if module.trainer.global_step == 50:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        before(patch, LanguageModel, "training_step", after_a_third)
        assert fit(*arguments, started=95.0) == 143
    used = machine.now - 95
    machine.wait(1000)  # what passes between two processes does not count
    began = machine.now
    machine.wait(5)
    assert fit(*arguments, started=began) == 0
    used += machine.now - began
    last = summary()
    assert 30 - last["reserve_seconds"] - 0.2 < used - 1.3 <= 30 - last["reserve_seconds"]
    rates = [row["lr"] for row in rows(RUN) if "lr" in row]
    assert len(rates) == last["steps"] > 60
    assert rates[-1] == pytest.approx(0.02 * 5e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:])), "no jump back where it was resumed"


def test_time_used_before_a_resume_counts(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit("--run.max_minutes=60", started=time.monotonic() - 1000) == 0
    assert summary()["used_seconds"] > 1000
    assert fit("--run.max_minutes=60", "--trainer.max_steps=12", "--resume=must", started=time.monotonic() - 500) == 0
    assert 1500 < summary()["used_seconds"] < 1600
    assert fit("--run.max_minutes=20", "--trainer.max_steps=99", "--resume=must") == 0
    assert summary()["steps"] == 12, "no time was left"


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_its_exit_code(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def at_step_three(module: Any) -> None:
        if module.trainer.global_step == 2 and module.trainer.training:
            signal.raise_signal(signum)

    before(monkeypatch, LanguageModel, "training_step", at_step_three)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert fit() == 128 + signum
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert (RUN / "checkpoints/step-000003.ckpt").is_file()
    assert summary()["status"] == "stopped"
    assert "step-000003.ckpt is written: the same command with --resume auto goes on" in capfd.readouterr().err


def test_a_validation_that_a_signal_cut_off_is_made_up_for(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def in_the_last_validation(module: Any) -> None:
            if module.trainer.global_step == 8 and not module.trainer.sanity_checking:
                signal.raise_signal(signal.SIGTERM)

        before(patch, LanguageModel, "validation_step", in_the_last_validation)
        assert fit() == 143
    assert [row["step"] for row in rows(RUN) if "val/loss" in row] == [4]
    assert fit("--resume=must") == 0
    assert summary()["status"] == "finished"
    assert summary()["val_loss"] == summary()["validation"]["val/loss"]
    best = json.loads((RUN / "checkpoints/step-000008.json").read_text())
    assert best["metrics"]["val/loss"] == summary()["val_loss"]


@pytest.fixture
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is printed goes into a pipe whose reader has gone, as `2>&1 | tee log` goes by the same Ctrl-C."""
    kept = os.dup(1), os.dup(2)
    reader, writer = os.pipe()
    os.close(reader)
    for name, number in (("sys.stdout", 1), ("sys.stderr", 2)):
        os.dup2(writer, number)
        monkeypatch.setattr(name, open(number, "w", closefd=False))  # noqa: SIM115
    yield
    for number, before in enumerate(kept, start=1):
        os.dup2(before, number)
    for number in (writer, *kept):
        os.close(number)


@pytest.mark.usefixtures("nobody_reads")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_though_nobody_reads_what_is_said(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    before(monkeypatch, LanguageModel, "training_step", lambda _: signal.raise_signal(signum))
    assert fit() == 128 + signum
    assert (RUN / "checkpoints/step-000001.ckpt").is_file()
    assert summary()["status"] == "stopped"


def test_an_interrupt_writes_into_no_file_that_took_the_place_of_a_closed_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, kept = Signals(), os.dup(2)
    signals.deferred = True
    monkeypatch.setattr("sys.stderr", None)
    try:
        with open(tmp_path / "metrics", "wb") as file:
            os.dup2(file.fileno(), 2)
        signals._handle(signal.SIGINT, None)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert signals.received == signal.SIGINT
    assert (tmp_path / "metrics").read_bytes() == b""


def test_a_signal_that_comes_with_the_handlers_is_no_crash(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    install = Signals.install

    def install_and_be_hit(self: Signals) -> None:
        install(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Signals, "install", install_and_be_hit)
    assert fit() == 143


@pytest.mark.parametrize("early", [True, False])
def test_a_rank_tells_the_first_one_of_its_end_unless_they_end_together(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    monkeypatch.setenv(cli.PARENT, str(os.getppid()))
    monkeypatch.setattr(cli, "end_with", lambda parent: None)
    owner, name = (cli, "default_configs") if early else (LanguageModel, "training_step")
    before(monkeypatch, owner, name, lambda _: signal.raise_signal(signal.SIGTERM))
    assert fit() == (143 if early else 0)


def test_a_rank_out_of_memory_tells_the_first_one(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv(cli.PARENT, str(os.getppid()))
    monkeypatch.setattr(cli, "end_with", lambda parent: None)
    before(monkeypatch, LanguageModel, "training_step", fail)
    assert fit() == 1
    assert "out of memory with data.batch_size=4" in capsys.readouterr().err


def test_a_signal_outside_training_ends_the_process_at_once() -> None:
    signals = Signals()
    signals.install()
    try:
        with pytest.raises(Stopped) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.value.exit_code == 143
    finally:
        signals.restore()


def test_an_ignored_signal_stays_ignored() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    try:
        signals.install()
        signal.raise_signal(signal.SIGHUP)
        assert not signals.received
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, handler)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's job 7; the file says what its scontrol was asked for."""
    scontrol, asked = tmp_path / "scontrol", tmp_path / "asked"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    asked.write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return asked


def test_slurm_is_asked_to_start_the_job_again(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeue_job()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue_job()
    assert slurm.read_text().splitlines() == ["requeue 7", "requeue 5_3"]


@pytest.mark.parametrize(("rank", "asked"), [("0", "requeue 7\n"), ("1", "")])
def test_slurm_is_asked_by_the_first_rank_before_training_too(
    fit: Fit, slurm: Path, monkeypatch: pytest.MonkeyPatch, rank: str, asked: str
) -> None:
    monkeypatch.setenv("SLURM_PROCID", rank)
    before(monkeypatch, cli, "default_configs", lambda _: signal.raise_signal(signal.SIGUSR1))
    assert fit() == 138
    assert slurm.read_text() == asked


# -------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def poison(module: Any) -> None:
        if module.trainer.global_step == 5 and module.trainer.training:
            with torch.no_grad():
                module.model.lm_head.weight[0, 0] = value

    before(monkeypatch, LanguageModel, "training_step", poison)
    assert fit("--model.transformer.head=untied", "--trainer.log_every_n_steps=4") == 3
    assert summary()["status"] == "diverged"
    assert [path.name for path in sorted((RUN / "checkpoints").glob("*.ckpt"))] == ["step-000004.ckpt"]
    saved = torch.load(RUN / "checkpoints/step-000004.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in saved.values())
    last = rows(RUN)[-1]
    assert last["step"] == 6
    assert last["train/loss"] is None, "the update that was not finite is in the log"


def test_a_run_that_diverges_before_its_first_row_is_no_crash(fit: Fit) -> None:
    assert fit("--model.optimizer.lr=1e38", "--trainer.log_every_n_steps=50") == 3
    assert summary()["status"] == "diverged"
    [row] = rows(RUN)
    assert None in (row["train/loss"], row["grad_norm"]), "the update that was not finite is in the log"


# ----------------------------------------------------------------------------------------------------- one at a time


@pytest.mark.slow
def test_two_runs_cannot_share_a_folder(fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    from lm.checkpoint import lock_run

    assert fit() == 0
    with lock_run(RUN):
        assert fit("--resume=must", "--trainer.max_steps=9") == 2
    assert "is in use by process" in capfd.readouterr().err


def test_what_to_resume_is_said_or_missed(fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit("--resume=must")
    assert stop.value.code == 2
    assert "no run in logs/toy has a good checkpoint" in capfd.readouterr().err
    assert fit("--resume=auto") == 0
    assert "nothing to resume in logs/toy: starting a new run" in capfd.readouterr().out
    assert fit("--resume=auto", "--trainer.max_steps=10") == 0
    assert "resuming logs/toy/version_0/checkpoints/step-000008.ckpt" in capfd.readouterr().out
    assert summary()["steps"] == 10
    assert [row["step"] for row in rows(RUN) if "lr" in row] == list(range(1, 11)), "no row lost, none doubled"
    assert not Path("logs/toy/version_1").exists()
    assert fit("--resume=never") == 0
    assert Path("logs/toy/version_1/checkpoints/step-000008.ckpt").is_file()


@pytest.mark.parametrize("limit", ["steps", "clock"])
def test_a_finished_run_that_is_started_again_stays_as_it_is(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], limit: str
) -> None:
    arguments, began = ["--resume=auto", "--trainer.max_steps=6"], [time.monotonic()] * 2
    if limit == "clock":
        machine, began = SlowMachine(monkeypatch, 0.1, validation=0.1, save=0.3, sample=0.4), [95.0, 1000.0]
        arguments = ["--resume=auto", "--trainer.max_steps=100000", "--run.max_minutes=0.15"]
    assert fit(*arguments, started=began[0]) == 0
    assert "finished: " in capfd.readouterr().out
    files = [RUN / "metrics.jsonl", *sorted(RUN.glob("*.json")), *sorted((RUN / "checkpoints").iterdir())]
    contents = {path: path.read_bytes() for path in files}
    if limit == "clock":
        machine.wait(began[1] - machine.now)
    assert fit(*arguments, started=began[1]) == 0
    assert "nothing left to do: finished before, " in capfd.readouterr().out
    assert {path: path.read_bytes() for path in files} == contents
    assert list(RUN.glob("config*.yaml")) == [RUN / "config.yaml"]
    assert sorted((RUN / "checkpoints").iterdir()) == files[2:]


@pytest.mark.parametrize("stop", [6, 8])
def test_a_finished_run_that_goes_on_keeps_its_last_validation(fit: Fit, stop: int) -> None:
    """Whether it was one of those that come every so many steps or not."""
    assert fit(f"--trainer.max_steps={stop}") == 0
    finished = rows(RUN)
    assert fit("--trainer.max_steps=12", "--resume=must") == 0
    assert rows(RUN)[: len(finished)] == finished
    assert [row["step"] for row in rows(RUN) if "lr" in row] == list(range(1, 13))
    assert [row["step"] for row in rows(RUN) if "val/loss" in row] == sorted({4, stop, 8, 12})
    assert summary()["best_val_loss"] == min(row["val/loss"] for row in rows(RUN) if "val/loss" in row)


@pytest.mark.parametrize("steps", [8, 12])
def test_a_validation_of_which_only_the_row_was_written_is_in_the_log_once(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    def die(path: Path) -> None:
        if path.name == "step-000008.ckpt":
            raise Stopped.by_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        before(patch, control, "note_metrics", die)
        assert fit() == 143
    assert [row["step"] for row in rows(RUN) if "val/loss" in row] == [4, 8]
    assert fit("--resume=must", f"--trainer.max_steps={steps}") == 0
    assert [row["step"] for row in rows(RUN) if "val/loss" in row] == list(range(4, steps + 1, 4))
    assert summary()["status"] == "finished"
    assert summary()["val_loss"] == rows(RUN)[-1]["val/loss"]


def test_a_checkpoint_whose_record_was_not_yet_written_is_gone_on_from(
    fit: Fit, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    (RUN / "checkpoints/step-000008.json").unlink()
    assert fit("--resume=must", "--trainer.max_steps=10") == 0
    assert "resuming logs/toy/version_0/checkpoints/step-000008.ckpt" in capfd.readouterr().out
    assert (RUN / "checkpoints/step-000008.json").is_file()
    assert [row["step"] for row in rows(RUN) if "lr" in row] == list(range(1, 11))
    assert [row["step"] for row in rows(RUN) if "val/loss" in row] == [4, 8, 10]


@pytest.mark.slow
def test_a_changed_learning_rate_takes_effect_on_resume_and_a_changed_model_is_refused(
    fit: Fit, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    changed = ["--resume=must", "--trainer.max_steps=16", "--model.optimizer.lr=0.25", "--model.optimizer.eps=0.125"]
    assert fit(*changed) == 0
    assert next(row["lr"] for row in rows(RUN) if row["step"] == 9 and "lr" in row) > 0.05
    saved = torch.load(RUN / "checkpoints/step-000016.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["eps"] == 0.125
    assert fit("--resume=must", "--trainer.max_steps=20", "--model.transformer.norm=post") == 2
    assert "another model: norm: checkpoint pre, now post" in capfd.readouterr().err
    assert fit("--resume=must", "--trainer.max_steps=20", "--data.batch_size=2") == 2
    assert "global_batch_size: checkpoint 4, now 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_minutes": 0.0}, "max_minutes=0.0 must be positive"),
        ({"validate_every_n_steps": 0}, "validate_every_n_steps=0 must be positive"),
        ({"sample_tokens": -1}, "sample_tokens=-1 must be from 0 to 1,000,000"),
        ({"name": ""}, "name='' must be a name, not a path: --run.logs says where"),
        ({"name": "."}, "name='.' must be a name"),
        ({"name": "/x"}, "name='/x' must be a name"),
        ({"name": "study/../../x"}, "name='study/../../x' must be a name"),
        ({"sample_tokens": 1_000_001}, "sample_tokens=1000001 must be from 0 to 1,000,000"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig(**setting)


def test_the_first_of_several_signals_counts() -> None:
    signals = Signals()
    signals.deferred = True
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signals._handle(signum, None)
    assert signals.received == signal.SIGTERM


@pytest.mark.parametrize("kept", [1, 4])
def test_as_many_checkpoints_are_kept_as_the_setting_says(fit: Fit, kept: int) -> None:
    assert (
        fit(
            "--run.checkpoint_every_n_steps=1",
            "--run.validate_every_n_steps=1000",
            f"--run.keep_checkpoints={kept}",
            "--trainer.max_steps=6",
            "--trainer.limit_val_batches=0",
        )
        == 0
    )
    assert len(list((RUN / "checkpoints").glob("*.ckpt"))) == kept


def test_when_training_has_ended_a_signal_ends_the_process_at_once() -> None:
    run = RunControl(RunConfig())
    run.signals.deferred = True
    run.on_train_end(MagicMock(Trainer, global_step=0), MagicMock(LanguageModel))
    with pytest.raises(Stopped):
        run.signals._handle(signal.SIGINT, None)
