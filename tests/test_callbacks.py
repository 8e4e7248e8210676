"""What looks on while a run trains: the log of its figures, samples, the progress line, the summary."""

import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import SETTINGS, make_dataset, rows

from lm import callbacks, checkpoint, cli, control
from lm.accounting import training_memory_bytes
from lm.callbacks import MetricsLog, Progress
from lm.control import RunConfig, RunControl
from lm.model import TransformerConfig
from lm.module import LanguageModel
from tokenizer import Tokenizer

RUN = Path("logs/toy/version_0")
Fit = Callable[..., int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def fit(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])

    def fit(*arguments: str) -> int:
        return cli.main(["fit", f"--data.directory={dataset}", *SETTINGS, *arguments], time.monotonic())

    return fit


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return accumulator


def steps(accumulator: EventAccumulator, name: str) -> list[int]:
    return [event.step for event in accumulator.Scalars(name)]


# ----------------------------------------------------------------------------------------------------------- metrics


def test_rows_stand_at_true_steps_in_the_log_and_in_tensorboard(fit: Fit) -> None:
    assert fit("--trainer.log_every_n_steps=2", "--run.sample_prompt=the cat") == 0
    lines = rows(RUN)
    assert [(row["step"], "val/loss" in row) for row in lines] == [
        *((2, False), (4, False), (4, True)),
        *((6, False), (8, False), (8, True)),
    ]
    board = events(RUN)
    assert steps(board, "train/loss") == steps(board, "lr") == steps(board, "grad_norm") == [2, 4, 6, 8]
    assert steps(board, "val/loss") == steps(board, "val/bits_per_byte") == [4, 8]
    assert steps(board, "tokens_per_second") == [2, 4, 6, 8]
    assert steps(board, "mfu") == [2, 4, 6, 8]  # on a device without a data sheet too
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [row["train/loss"] for row in lines if "train/loss" in row]
    )
    assert "by_seconds/val/loss" in board.Tags()["scalars"]
    assert "epoch" not in board.Tags()["scalars"]
    [*_, text] = board.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0].startswith(b"the cat")
    assert board.Scalars("hp/val_loss")[-1].value == pytest.approx(lines[-1]["val/loss"])
    assert "_hparams_/session_start_info" in board.summary_metadata


def test_a_torn_or_surplus_line_is_cut_off_when_the_run_goes_on(fit: Fit) -> None:
    assert fit() == 0
    whole = rows(RUN)
    with open(RUN / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/loss": 1.0}\n{"step": 10, "tr')
    assert fit("--resume=must", "--trainer.max_steps=10") == 0
    again = rows(RUN)
    assert [row for row in again if row["step"] < 8] == [row for row in whole if row["step"] < 8]
    assert [row["step"] for row in again if "lr" in row] == list(range(1, 11))
    assert steps(events(RUN), "train/loss") == list(range(1, 11)), "TensorBoard goes on with the same curve"


def test_speed_leaves_out_validation_and_saving(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def tick() -> float:
        clock.now += 0.001
        return clock.now

    def takes_hours(*_: Any) -> None:
        clock.now += 10_000

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=tick, perf_counter=time.perf_counter))
    monkeypatch.setattr(RunControl, "on_validation_start", takes_hours)
    monkeypatch.setattr(RunControl, "on_save_checkpoint", takes_hours)
    assert fit("--trainer.max_steps=12", "--run.validate_every_n_steps=4") == 0
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    seconds = [64 / row["tokens_per_second"] for row in lines if "tokens_per_second" in row]
    assert len(seconds) == 12
    assert max(seconds) < 0.1
    assert clock.now > 30_000


def test_a_log_that_lost_its_end_goes_on_with_whole_rows(fit: Fit) -> None:
    """After a power cut it may be shorter than the checkpoint knew it."""
    assert fit() == 0
    whole, path = rows(RUN), RUN / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b'{"step": 6') + 7])
    assert fit("--resume=must", "--trainer.max_steps=10") == 0
    assert [row for row in rows(RUN) if row["step"] < 9] == [row for row in whole if row["step"] < 6]
    assert [row["step"] for row in rows(RUN) if row["step"] > 8] == [9, 10, 10]


def test_the_log_is_on_the_device_before_the_checkpoint_and_its_record(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, write_checkpoint, note_metrics = os.fsync, checkpoint.write_checkpoint, control.note_metrics

    def spy(file: int) -> None:
        log = RUN / "metrics.jsonl"
        if log.is_file() and os.path.samestat(os.fstat(file), log.stat()):
            done.append(f"log {len(rows(RUN))}")
        fsync(file)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *a: (done.append("checkpoint"), write_checkpoint(*a))[1])
    monkeypatch.setattr(control, "note_metrics", lambda *a: (done.append("record"), note_metrics(*a))[1])
    assert fit() == 0
    assert done == ["log 4", "checkpoint", "log 5", "record", "log 9", "checkpoint", "log 10", "record"]


# ------------------------------------------------------------------------------------------------------------ screen


def test_the_header_says_what_the_run_is(fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.accumulate_grad_batches=2") == 0
    said = capfd.readouterr().out
    for part in ("logs/toy/version_0", "6,720 parameters", "d_model 16", "128 tokens per step", "8 steps", "1 x "):
        assert part in said, part
    assert "finished: 8 steps, 1,024 tokens" in said
    assert "MFLOP per token" in said
    assert "python -m lm generate" in said


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_header_says_what_memory_this_kind_of_device_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(callbacks, "device_name", lambda device: device.type)
    config = TransformerConfig(vocab_size=512, context_length=1024, num_layers=2, d_model=64, num_heads=4, d_ff=128)
    data = SimpleNamespace(batch_size=8, context_length=1024, directory=tmp_path, meta={"splits": {}})
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=-1)
    trainer.strategy._root_device = torch.device(kind)  # type: ignore[attr-defined]
    monkeypatch.setattr(callbacks, "dataset", lambda trainer: data)
    control = RunControl(RunConfig())
    control.directory = tmp_path
    said = callbacks.header(trainer, LanguageModel(config), control)
    assert f"about {training_memory_bytes(config, 8, device_type=kind) / 1e9:.2g} GB per device" in said


def test_the_progress_line_has_loss_speed_and_time_left() -> None:
    control = RunControl(RunConfig())
    metrics = MetricsLog(control)
    metrics.last = {"train/loss": 2.0, "val/loss": 3.0, "tokens_per_second": 100.0}
    metrics.tokens_seen = 1000
    assert Progress(control, metrics).line(10, 100) == "step 10/100 · loss 2.000 · val 3.000 · 100 tokens/s · 1:30 left"


def test_time_left_is_that_of_the_clock_when_it_ends_first() -> None:
    control = RunControl(RunConfig(max_minutes=1.0))
    metrics = MetricsLog(control)
    metrics.last, metrics.tokens_seen = {"tokens_per_second": 1.0}, 1000
    assert Progress(control, metrics).seconds_left(10, 100) == pytest.approx(60, abs=20)  # by the steps 90


def test_a_terminal_gets_a_moving_line(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    assert fit() == 0
    assert "step 4: loss" in screen.getvalue()


@pytest.mark.parametrize("stream", ["sys.stderr", "sys.stdout"])
@pytest.mark.parametrize("hang_up", [True, False])
def test_a_run_outlives_its_terminal_and_is_saved_when_that_hangs_up(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, stream: str, hang_up: bool
) -> None:
    window, terminal = os.openpty()
    training_step = LanguageModel.training_step

    def close_the_window(self: LanguageModel, *args: Any) -> torch.Tensor:
        if self.trainer.global_step == 2:
            os.close(window)
            if hang_up:
                signal.raise_signal(signal.SIGHUP)
        return training_step(self, *args)

    monkeypatch.setattr(LanguageModel, "training_step", close_the_window)
    with open(terminal, "w") as file:
        monkeypatch.setattr(stream, file)
        assert fit() == (129 if hang_up else 0)
    summary = json.loads((RUN / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == (("stopped", 3) if hang_up else ("finished", 8))


# ------------------------------------------------------------------------------------------------------ the run's files


def test_a_run_is_complete_in_itself(fit: Fit, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit() == 0
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["tokens"], summary["budget_seconds"]) == (8, 512, None)
    assert summary["best_val_loss"] <= summary["val_loss"]
    assert summary["settings"]["transformer.d_model"] == 16
    assert Path(summary["checkpoint"]).is_file()
    assert (RUN / "tokenizer/merges.txt").read_bytes() == (dataset / "tokenizer/merges.txt").read_bytes()
    saved = (RUN / "config.yaml").read_text()
    assert f"directory: {dataset}" in saved
    assert "resume" not in saved


def test_a_run_that_fails_says_so_in_its_summary(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lm.module.LanguageModel.training_step", fail)
    assert fit() == 1
    assert json.loads((RUN / "summary.json").read_text())["status"] == "failed"


def test_several_devices_share_the_peak_that_mfu_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "device_flops", lambda trainer: 1e12)
    config = TransformerConfig(257, 16, 1, 2, 8, 16)

    def share(world_size: int) -> float:
        log = MetricsLog(RunControl(RunConfig()))
        log.path = tmp_path / "metrics.jsonl"
        trainer: Any = MagicMock(Trainer, is_global_zero=False, log_every_n_steps=1, world_size=world_size)
        log.on_train_start(trainer, MagicMock(transformer=config))
        return log.flops_share

    assert share(1) == pytest.approx(2 * share(2))


def test_a_file_gets_a_line_of_progress_every_ten_seconds_and_no_oftener(
    fit: Fit, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.log_every_n_steps=1") == 0
    assert capfd.readouterr().err.count("tokens/s") <= 1


def test_no_text_is_sampled_where_there_is_nothing_to_begin_one_with(tmp_path: Path) -> None:
    Tokenizer({i: bytes([i]) for i in range(256)}, []).save(tmp_path / "tokenizer")
    trainer: Any = MagicMock(Trainer, is_global_zero=True)
    trainer.datamodule = MagicMock(directory=tmp_path)
    for prompt, loaded in (("", False), ("a", True)):
        samples = callbacks.Samples(RunControl(RunConfig(sample_prompt=prompt)))
        samples.setup(trainer, None, "fit")
        assert (samples.tokenizer is not None) == loaded
