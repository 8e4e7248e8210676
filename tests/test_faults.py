"""What goes wrong around a run: signals, dying ranks, full disks, too little time, numbers that are not finite."""

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from test_resume import differences
from toy import SETTINGS, make_dataset, rows

from lm import callbacks, checkpoint, cli
from lm.checkpoint import find_run, load_model, newest_checkpoint, read_checkpoint
from lm.module import LanguageModel
from lm.ranks import failure, make_strategy

TWO_RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"]
ENDLESS = ["--trainer.max_steps=1000000", "--run.validate_every_n_steps=50", "--trainer.log_every_n_steps=5"]


# Runs `python -m lm` with a fault in one rank at one step, named by the environment variable FAULT.
DRIVER = """
import os, signal, sys, time
from lm.__main__ import main

if __name__ == "__main__":
    kind, rank, step = os.environ["FAULT"].split()
    if os.environ.get("LOCAL_RANK", "0") == rank:
        from lm import checkpoint
        from lm.module import LanguageModel
        training_step, validation_step = LanguageModel.training_step, LanguageModel.validation_step
        write_checkpoint = checkpoint.write_checkpoint

        def faulty_step(self, batch, batch_idx):
            loss = training_step(self, batch, batch_idx)
            if self.trainer.global_step == int(step):
                print("now the fault", flush=True)
                if kind == "raise":
                    raise RuntimeError("the fault of this rank")
                if kind == "kill":
                    os.kill(os.getpid(), 9)
                if kind in ("SIGINT", "SIGTERM"):
                    os.killpg(0, getattr(signal, kind))
                if kind == "hang":
                    time.sleep(1000)
                if kind == "nan":
                    loss = loss * float("nan")
            return loss

        def slow_validation(self, *args):
            time.sleep(0.2)
            validation_step(self, *args)

        def faulty_write(contents, path):
            if kind == "save" and contents["global_step"] >= int(step):
                raise OSError(28, f"cannot save {path}: No space left on device")
            if kind == "slow":
                time.sleep(1)
            return write_checkpoint(contents, path)

        if kind in ("one", "all"):  # is hit before training
            from lm import cli
            signalled = {"one": os.getpid(), "all": -os.getpgid(0)}[kind]
            cli.CLI.before_instantiate_classes = lambda self: os.kill(signalled, int(step))
        LanguageModel.training_step, checkpoint.write_checkpoint = faulty_step, faulty_write
        if kind == "slow":
            LanguageModel.validation_step = slow_validation
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


class Job:
    """`python -m lm fit` as a user has it: a process group of its own, its output in a file."""

    def __init__(self, folder: Path, dataset: Path, *arguments: str, fault: str | None = None, **environment: str):
        names = [option.split("=")[1] for option in arguments if option.startswith("--run.name=")]
        self.run = folder / "logs" / (names or ["toy"])[0] / "version_0"
        self.log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        (folder / "driver.py").write_text(DRIVER)
        program = ["-m", "lm"] if fault is None else [str(folder / "driver.py")]
        options = [f"--data.directory={dataset}", *SETTINGS, f"--run.logs={folder / 'logs'}", *arguments]
        paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "FAULT": fault or ""}
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, "fit", *options],
                env=os.environ | paths | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def wait_for_rows(self, count: int) -> None:
        path = self.run / "metrics.jsonl"
        self.wait_until(lambda: path.is_file() and len(path.read_bytes().splitlines()) >= count)

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in self.log.read_text())

    def wait_for_checkpoint(self, step: int) -> None:
        """Of this step or a later one: an older one may be gone by the time one looks."""
        folder = self.run / "checkpoints"
        self.wait_until(lambda: any(int(path.stem.split("-")[1]) >= step for path in folder.glob("step-*.json")))

    def ranks(self) -> list[int]:
        """The processes of a job of two ranks, the first rank first."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        if not children.is_file():
            pytest.skip("no /proc here")
        return [self.process.pid, *(int(pid) for pid in children.read_text().split())]

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code and output, once every process of the job is gone."""
        try:
            code = self.process.wait(seconds)
            for _ in range(300):
                try:
                    os.killpg(self.process.pid, 0)
                except ProcessLookupError:
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("a process of the job has outlived it")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return code, self.log.read_text()


@pytest.fixture(scope="module")
def shortest(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> float:
    """Seconds that two ranks need here for one step: what else is measured in time goes by this."""
    began = time.monotonic()
    code, output = Job(tmp_path_factory.mktemp("shortest"), dataset, *TWO_RANKS, "--trainer.max_steps=3").end()
    assert code == 0, output
    return time.monotonic() - began


@pytest.fixture
def job(tmp_path: Path, dataset: Path) -> Callable[..., Job]:
    return lambda *arguments, **options: Job(tmp_path, dataset, *arguments, **options)


@pytest.fixture
def fit(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The same in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])
    return lambda *arguments: cli.main(
        ["fit", f"--data.directory={dataset}", *SETTINGS, "--run.logs=logs", *arguments], time.monotonic()
    )


def check_whole(run: Path) -> dict[str, Any]:
    """The newest checkpoint, after a look at everything a run leaves: nothing half written, nothing left over."""
    assert not list(run.rglob("*.part"))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] > 0
    path = newest_checkpoint(run)
    load_model(path)
    return read_checkpoint(path)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------------ numbers and disks


def test_a_run_whose_loss_is_not_finite_stops_as_diverged_and_keeps_the_last_finite_checkpoint(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = LanguageModel.training_step

    def faulty_step(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        return training_step(self, batch, batch_idx) * (float("inf") if self.trainer.global_step == 6 else 1)

    monkeypatch.setattr(LanguageModel, "training_step", faulty_step)
    assert fit() == 3
    run = tmp_path / "logs/toy/version_0"
    contents = check_whole(run)
    assert contents["global_step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in contents["state_dict"].values())
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 4, 5, 6, 7]
    assert json.loads((run / "summary.json").read_text())["status"] == "diverged"


def test_a_learning_rate_that_is_far_too_high_is_a_result_and_no_crash(fit: Callable[..., int], tmp_path: Path) -> None:
    assert fit("--model.optimizer.lr=1e25", "--trainer.gradient_clip_val=null") == 3
    check = json.loads((tmp_path / "logs/toy/version_0/summary.json").read_text())
    assert check["status"] == "diverged"


def test_an_infinite_gradient_leaves_the_weights_as_they_are(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = LanguageModel.configure_gradient_clipping

    def faulty_clip(self: LanguageModel, *args: Any, **kwargs: Any) -> None:
        if self.trainer.global_step == 5:
            self.model.ln_final.weight.grad[0] = float("inf")
        clip(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", faulty_clip)
    assert fit("--run.checkpoint_every_n_steps=1", "--run.keep_checkpoints=99") == 3
    contents = check_whole(tmp_path / "logs/toy/version_0")
    assert contents["global_step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in contents["state_dict"].values())


def test_a_full_disk_ends_the_run_with_one_line_and_the_checkpoint_before(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = checkpoint.torch.save

    def no_room(path: Path, mode: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def full(contents: dict[str, Any], file: Any) -> None:
        write(contents, file)
        if contents["global_step"] >= 8:
            file.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        patch.setattr(callbacks, "atomic_write", no_room)
        assert fit() == 1
    [line] = errors(capsys.readouterr().err)
    assert re.search(
        r"cannot save .*step-000008.ckpt: No space left on device; it takes [\d,]+ bytes or a little", line
    )
    run = tmp_path / "logs/toy/version_0"
    assert check_whole(run)["global_step"] == 4
    assert fit("--resume=must") == 0  # with room again, the run goes on
    assert check_whole(run)["global_step"] == 8


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_row_leaves_whole_rows(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:10] if b'"step": 7' in data else data)

    def faulty_open(path: Any, *args: Any, **kwargs: Any) -> Any:
        return Full(path, "a+b") if Path(path).name == "metrics.jsonl" else open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "open", faulty_open, raising=False)
        assert fit() == 1
    [line] = errors(capsys.readouterr().err)
    assert "No space left on device" in line
    assert "metrics.jsonl" in line
    run = tmp_path / "logs/toy/version_0"
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 4, 5, 6]
    assert check_whole(run)["global_step"] == 4
    assert fit("--resume=must") == 0  # with room again, the run goes on
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_a_disk_too_small_for_the_checkpoints_is_said_before_training(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert fit() == 2
    [line] = errors(capsys.readouterr().err)
    assert re.search(r"has 1,000 bytes free, the run needs about \d\d\d,\d\d\d: make room", line)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--data.batch_size 2 --trainer.accumulate_grad_batches 2"),
        (MemoryError(), "--data.batch_size 2 --trainer.accumulate_grad_batches 2"),
    ],
)
def test_running_out_of_memory_says_what_batch_size_to_try(
    fit: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    advice: str,
) -> None:
    training_step = LanguageModel.training_step

    def faulty_step(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 5:
            raise error
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", faulty_step)
    assert fit() == 1
    [line] = errors(capsys.readouterr().err)
    assert "data.batch_size=4" in line
    assert advice in line
    assert check_whole(tmp_path / "logs/toy/version_0")["global_step"] == 4


# -------------------------------------------------------------------------------------------------- data and files


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "train.npy", 0), "train.npy is empty"),
        (lambda folder: os.truncate(folder / "train.npy", 1000), "its header promises"),
        (lambda folder: np.save(folder / "train.npy", np.arange(9)), "holds <i8"),
        (lambda folder: np.save(folder / "valid.npy", np.arange(9, dtype=np.uint16)), "has 9 tokens, meta.json says"),
        (lambda folder: (folder / "valid.npy").unlink(), "no token file at"),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda folder: (folder / "meta.json").unlink(), "python -m lm prepare"),
    ],
)
def test_bad_data_is_one_line_and_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    data = make_dataset(tmp_path / "data")
    damage(data)
    monkeypatch.setattr("sys.argv", ["lm"])
    arguments = ["fit", f"--data.directory={data}", *SETTINGS, f"--run.logs={tmp_path / 'logs'}"]
    assert cli.main(arguments, time.monotonic()) == 2
    [line] = errors(capsys.readouterr().err)
    assert message in line
    assert not (tmp_path / "logs/toy").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_shrinks_under_a_run_ends_it_with_one_line_and_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    data = make_dataset(tmp_path / "data")
    training_step = LanguageModel.training_step

    def faulty_step(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 5:
            os.truncate(data / "train.npy", 200)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", faulty_step)
    monkeypatch.setattr("sys.argv", ["lm"])
    arguments = [f"--data.directory={data}", *SETTINGS, f"--run.logs={tmp_path}", f"--data.num_workers={num_workers}"]
    assert cli.main(["fit", *arguments, "--trainer.max_steps=100"], time.monotonic()) == 1
    [line] = errors(capsys.readouterr().err)
    assert "train.npy shrank while it was open" in line
    assert check_whole(tmp_path / "toy/version_0")["global_step"] >= 4  # a worker had read ahead


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_model_and_data_only(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps=4") == 0
    for change, message in {
        "--data.batch_size=8": "global_batch_size: checkpoint 4, now 8",
        "--data.windows=epoch": "windows: checkpoint replacement, now epoch",
        "--data.context_length=8": "context_length: checkpoint 16, now 8",
        "--model.transformer.norm=post": "norm: checkpoint pre, now post",
        "--model.transformer.d_model=32": "d_model: checkpoint 16, now 32",
    }.items():
        assert fit("--resume=must", change) == 2
        [line] = errors(capsys.readouterr().err)
        assert message in line


def test_a_foreign_checkpoint_is_refused_in_one_line_and_runs_nothing(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    contents = {"malicious": {"state_dict": Malicious()}, "foreign": {"state_dict": {}, "global_step": 5}}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
        assert fit(f"--ckpt_path={tmp_path / name}.ckpt") in (1, 2)
        [line] = errors(capsys.readouterr().err)
        assert re.search("nothing in it was executed|was not written by", line)
    assert not (tmp_path / "marker").exists()


def test_learning_rate_and_length_may_change_and_take_effect(fit: Callable[..., int], tmp_path: Path) -> None:
    assert fit("--trainer.max_steps=4", "--model.optimizer.lr=1e-3") == 0
    assert fit("--resume=must", "--trainer.max_steps=10", "--model.optimizer.lr=0.5") == 0
    trained = [row for row in rows(tmp_path / "logs/toy/version_0") if "lr" in row]
    assert [row["step"] for row in trained] == list(range(1, 11))
    assert max(row["lr"] for row in trained[:4]) <= 1e-3
    assert trained[4]["lr"] > 0.1


def test_a_damaged_newest_checkpoint_costs_only_itself(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    run = tmp_path / "logs/toy/version_0"
    whole = read_checkpoint(newest_checkpoint(run))
    newest = run / "checkpoints" / "step-000008.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert fit("--resume=must") == 0
    assert "step-000008.ckpt has" in capsys.readouterr().err
    assert (run / "checkpoints" / "step-000008.ckpt.bad").exists()
    again = read_checkpoint(newest_checkpoint(run))
    assert differences(again["state_dict"], whole["state_dict"]) == []
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        fit("--resume=must")


# ---------------------------------------------------------------------------------------------------------- signals


def test_fsdp_restores_no_damaged_checkpoint(tmp_path: Path) -> None:
    """Lightning's strategy does not ask the run's CheckpointIO."""
    path = tmp_path / "step-000001.ckpt"
    checkpoint.AtomicCheckpointIO().save_checkpoint({"global_step": 1, "state_dict": {"w": torch.ones(100)}}, path)
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"\0\0\x80\x3f") + 5] ^= 1  # in one of the ones
    path.write_bytes(contents)
    trainer = Namespace(devices=1, num_nodes=1, strategy="fsdp2")
    strategy = make_strategy(trainer, timedelta(minutes=1))
    with pytest.raises(checkpoint.CheckpointError, match="differs from the sha256 in its record"):
        strategy.load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_the_run_with_its_own_exit_code(
    job: Callable[..., Job], signum: signal.Signals, code: int
) -> None:
    run = job(*ENDLESS)
    run.wait_for_rows(8)
    run.process.send_signal(signum)
    ended, output = run.end()
    assert ended == code, output
    last = rows(run.run)[-1]["step"]
    assert last - 5 <= check_whole(run.run)["global_step"]
    assert "Traceback" not in output
    assert f"stopped by {signum.name}" in output


@pytest.mark.slow
def test_a_signal_at_any_moment_leaves_a_run_that_goes_on(job: Callable[..., Job]) -> None:
    """From the imports to the last line, with every signal, and twice."""
    randomness = random.Random(3)
    for _ in range(3):
        run = job(*ENDLESS, "--resume=auto", "--run.checkpoint_every_n_steps=3")
        time.sleep(randomness.uniform(0.2, 12))
        signum = randomness.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
        run.process.send_signal(signum)
        code, output = run.end()
        assert code in (128 + signum, -signum), output  # the latter before our handlers are there
        assert "Traceback" not in output
    steps = [int(path.stem.split("-")[1]) for path in run.run.parent.glob("*/checkpoints/*.json")]
    last = max(steps, default=0) + 5
    code, output = job(f"--trainer.max_steps={last}", "--resume=auto").end()
    assert code == 0, output
    assert check_whole(find_run(run.run.parent))["global_step"] == last  # stopped early enough, a run leaves none


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once_and_damages_nothing(job: Callable[..., Job]) -> None:
    run = job(*ENDLESS, fault="hang 0 60")
    run.wait_for_words("now the fault")
    run.process.send_signal(signal.SIGINT)
    run.wait_for_words("Ctrl-C again leaves at once")
    time.sleep(1)
    assert run.process.poll() is None  # it waits for the end of the step, which does not come
    run.process.send_signal(signal.SIGINT)
    code, output = run.end(60)
    assert code == 130, output
    assert check_whole(run.run)["global_step"] == 50


@pytest.mark.slow
def test_a_run_killed_over_and_over_gets_to_its_end(job: Callable[..., Job]) -> None:
    randomness = random.Random(5)
    arguments = ["--resume=auto", "--run.validate_every_n_steps=150", "--run.checkpoint_every_n_steps=1"]
    last = 0
    for _ in range(2):
        run = job(*arguments, "--trainer.max_steps=1000000")
        last += randomness.randint(30, 100)
        run.wait_for_checkpoint(last)
        run.process.kill()
        run.end()
        step = read_checkpoint(newest_checkpoint(run.run))["global_step"]
        assert step >= last
        last = step
    last += 50
    run = job(*arguments, f"--trainer.max_steps={last}")
    code, output = run.end()
    assert code == 0, output
    assert check_whole(run.run)["global_step"] == last
    assert [row["step"] for row in rows(run.run) if "train/loss" in row] == list(range(1, last + 1))
    assert len(list((run.run / "checkpoints").iterdir())) <= 6  # two kept and the best, each with its record


@pytest.mark.slow
def test_slurm_is_asked_to_start_a_pre_empted_job_again(job: Callable[..., Job], tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    run = job(*ENDLESS, PATH=path, SLURM_JOB_ID="77", SLURM_NTASKS="1", SLURM_JOB_NAME="train", SLURM_LOCALID="0")
    run.wait_for_rows(8)
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.end()
    assert code == 138, output
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    check_whole(run.run)


@pytest.mark.slow
def test_of_two_that_resume_one_run_at_once_one_is_refused(job: Callable[..., Job]) -> None:
    assert job().end()[0] == 0
    pair = [job(*ENDLESS, "--resume=auto") for _ in range(2)]
    end = time.monotonic() + 120
    while all(run.process.poll() is None for run in pair):
        assert time.monotonic() < end
        time.sleep(0.02)
    refused, goes_on = sorted(pair, key=lambda run: run.process.poll() is None)
    code, output = refused.end()
    assert code == 2, output
    assert "is in use by process" in output
    goes_on.wait_for_checkpoint(50)
    goes_on.process.send_signal(signal.SIGTERM)
    code, output = goes_on.end()
    assert code == 143, output
    assert check_whole(goes_on.run)["global_step"] >= 50
    assert [path.name for path in goes_on.run.parent.iterdir()] == ["version_0"]


# --------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_ranks_stop_together_when_the_whole_group_is_signalled_and_go_on_to_the_same_bits(
    job: Callable[..., Job], signum: signal.Signals, code: int
) -> None:
    length = ["--trainer.max_steps=60", "--run.validate_every_n_steps=20", "--trainer.log_every_n_steps=1"]
    run = job(*TWO_RANKS, *length, fault=f"{signum.name} 1 33")
    ended, output = run.end()
    assert ended == code, output
    assert 33 <= check_whole(run.run)["global_step"] < 60
    if signum is signal.SIGTERM:
        return  # how it stopped makes no difference to what follows
    code, output = job(*TWO_RANKS, *length, "--resume=must").end()
    assert code == 0, output
    whole = job(*TWO_RANKS, *length, "--run.name=whole")
    code, output = whole.end()
    assert code == 0, output
    assert rows(run.run) == rows(whole.run)
    assert differences(check_whole(run.run), check_whole(whole.run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_stop_together_when_one_of_them_is_signalled(job: Callable[..., Job], rank: int) -> None:
    run = job(*TWO_RANKS, *ENDLESS)
    run.wait_for_rows(8)
    os.kill(run.ranks()[rank], signal.SIGTERM)
    code, output = run.end()
    assert code == 143, output
    check_whole(run.run)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("one 1 15", 143), ("all 1 2", 130)])
def test_two_ranks_end_by_the_signal_that_hits_one_before_it_has_joined_the_other(
    job: Callable[..., Job], fault: str, code: int
) -> None:
    began = time.monotonic()
    ended, output = job(*TWO_RANKS, *ENDLESS, fault=fault).end()
    assert ended == code, output
    assert "Traceback" not in output and not errors(output)
    assert time.monotonic() - began < 120, "not run.timeout_minutes"


@pytest.mark.parametrize(("exit_code", "code"), [(-2, 130), (143, 143), (138, 138), (-9, 1), (1, 1), (3, 1)])
def test_the_signal_that_ended_one_rank_is_the_end_of_all(exit_code: int, code: int) -> None:
    assert failure(1, exit_code).exit_code == code


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_from_batches_of_both(job: Callable[..., Job], fit: Callable[..., int]) -> None:
    run = job(*TWO_RANKS, "--run.name=ranks", "--data.val_batch_size=3")
    variants = {"batch": [], "accumulation": ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2"]}
    for name, arguments in variants.items():
        assert fit(*arguments, f"--run.name={name}", "--data.val_batch_size=3") == 0
    code, output = run.end()
    assert code == 0, output
    results = {name: rows(run.run.parents[1] / name / "version_0") for name in ("ranks", *variants)}
    for name in ("batch", "accumulation"):
        for row, expected in zip(results[name], results["ranks"], strict=True):
            assert row.keys() == expected.keys()
            for key in row:
                assert row[key] == pytest.approx(expected[key], rel=2e-5), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("kill 1 30", 1, "rank"),
        ("raise 1 30", 1, "the fault of this rank"),
        ("hang 1 30", 1, "run.timeout_minutes"),
        ("save 0 30", 1, "No space left on device"),
        ("nan 1 30", 3, "not finite"),
    ],
)
def test_a_fault_of_one_rank_ends_the_job_soon_with_its_error_and_no_orphans(
    job: Callable[..., Job], shortest: float, fault: str, code: int, message: str
) -> None:
    patience = f"--run.timeout_minutes={(10 + 2 * shortest) / 60}"  # for the other rank to start, too
    run = job(*TWO_RANKS, *ENDLESS, "--run.validate_every_n_steps=20", patience, fault=fault)
    ended, output = run.end()  # long before the one that hangs would go on
    assert ended == code, output
    assert message in output
    assert check_whole(run.run)["global_step"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "code"), [(500, 1), (1.5, 5), (0, 5)])
def test_a_rank_that_fails_ends_the_first_one_unless_that_is_ending_by_itself(seconds: float, code: int) -> None:
    """One that waits for it for ever with a line of its own; the other may take its time, seconds here, to say why."""
    script = f"""
import subprocess, sys, time
from lightning.pytorch.strategies.launchers import subprocess_script
from lm.ranks import watched_ranks
with watched_ranks(patience=2):
    rank = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(7)"])
    subprocess_script._launch_process_observer([rank])
    time.sleep({seconds})
rank.wait()
time.sleep(6)
sys.exit(5)
"""
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert ended.returncode == code, ended.stderr
    assert ("rank 1 ended with exit code 7" in ended.stderr) == (code == 1)
    assert time.monotonic() - began < 300


# ------------------------------------------------------------------------------------------------------------- time


@pytest.mark.slow
def test_the_time_limit_holds_from_the_start_of_the_process_to_its_end(
    job: Callable[..., Job], shortest: float
) -> None:
    """With slow validation and slow saving; how exactly, test_control says by a clock of its own."""
    limit = 5 + 2 * shortest
    clock = [f"--run.max_minutes={limit / 60}", "--model.schedule.follow=clock", "--model.schedule.min_lr_ratio=0.1"]
    began = time.monotonic()
    run = job(*ENDLESS, *clock, "--run.validate_every_n_steps=1000000", "--data.val_batch_size=2", fault="slow 0 0")
    code, output = run.end()
    used = time.monotonic() - began
    assert code == 0, output
    assert used < limit + shortest / 4  # the interpreter's own start and end are on nobody's clock
    summary = json.loads((run.run / "summary.json").read_text())
    assert summary["budget_seconds"] == pytest.approx(limit)
    assert summary["used_seconds"] < min(used, limit)
    assert summary["val_loss"] is not None
    assert summary["reserve_seconds"] > 1 + 1.25 * (1 + 11 * 0.2)  # it knows of the slow validation and the slow save
    assert check_whole(run.run)["global_step"] == summary["steps"]
    rates = [row["lr"] for row in rows(run.run) if "lr" in row]
    assert rates[-1] < 0.3 * max(rates)
