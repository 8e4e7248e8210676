"""What looks on while a run trains: its figures, sample texts, the progress line, the header and the summary."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lm.accounting import (
    DeviceType,
    flops_per_token,
    matmul_dtype,
    num_parameters,
    peak_flops,
    training_memory_bytes,
)
from lm.control import RunControl, Stopped
from lm.device import device_name, matmul_flops
from lm.generate import END_OF_TEXT, Sampling, generate
from lm.module import LanguageModel
from lm.options import discard, say
from tokenizer import Tokenizer
from tokenizer.files import atomic_write, flush_folder


class MetricsLog(Callback):
    """Writes the figures of the run: one line of JSON per logged update or validation, and TensorBoard's curves.

    A line of `metrics.jsonl` is written whole, by one call, and is on the device before a checkpoint that follows it.
    A resumed run cuts off what it will write again, so that no line is lost and none doubled. `train/loss` is that of
    the very update, over all ranks; the speed counts everything but validations and saving. `mfu` is the model's FLOPs
    over the peak of the device's data sheet, or, without one, over the speed of a matrix product that is timed when
    the run begins.

    Args:
        control: gives the wall-clock.
    """

    def __init__(self, control: RunControl) -> None:
        self.control = control
        self.tokens_seen = 0
        self.last: dict[str, float] = {}
        self.last_step = 0  # of the last row; none has been written
        self._window: tuple[float, int] | None = None  # since when the speed is measured, and tokens seen then
        self._num_bytes = 0

    def state_dict(self) -> dict[str, int]:
        """Tokens seen."""
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        self.tokens_seen = state["tokens_seen"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the file."""
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / "metrics.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the file, or go on with it."""
        self.cut(trainer)
        self.every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        config = pl_module.transformer
        self.flops_share = flops_per_token(config) / (device_flops(trainer) * trainer.world_size)

    def cut(self, trainer: Trainer) -> None:
        """Drop what was written after the checkpoint that the run goes on from, and a validation still to be done."""
        if trainer.is_global_zero:
            with open(self.path, "a+b") as file:
                file.seek(0)
                self._num_bytes = rows_to_keep(file, trainer.global_step, not self.control.validation_pending)
                file.truncate(self._num_bytes)
            flush_folder(self.path.parent)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the speed from here, after a pause."""
        if self._window is None:
            self._window = time.monotonic(), self.tokens_seen

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the tokens; every `log_every_n_steps` updates a row."""
        self.tokens_seen += batch[0].numel() * trainer.world_size
        if trainer.fit_loop.epoch_loop._should_accumulate() or trainer.global_step % self.every:
            return
        self.log_update(trainer, pl_module)

    def log_update(self, trainer: Trainer, module: LanguageModel) -> None:
        """The row of the last update."""
        loss = trainer.strategy.reduce(module.step_loss.clone(), reduce_op="mean")
        # .item() waits for the device: it is the reason to log seldom, and it makes the clock below true.
        row = {
            "train/loss": loss.item(),
            "grad_norm": module.grad_norm.item(),
            "lr": module.learning_rate(trainer.global_step),
        }
        if self._window is not None:
            began, tokens = self._window
            row["tokens_per_second"] = (self.tokens_seen - tokens) / max(1e-9, time.monotonic() - began)
            row["mfu"] = row["tokens_per_second"] * self.flops_share
        self.write(trainer, row)
        self._window = time.monotonic(), self.tokens_seen

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A pause."""
        self._window = None
        self._flush(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A pause."""
        self._window = None

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The row of a validation."""
        if not trainer.sanity_checking:
            self.write(trainer, pl_module.validation_result)
            self._flush(trainer)  # before the checkpoint's record says that it has been validated

    def _flush(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """A run that diverged shows the update that did it."""
        if isinstance(exception, Stopped) and exception.status == "diverged" and self.last_step != trainer.global_step:
            self.log_update(trainer, pl_module)

    def write(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """Append a row and give it to the loggers, at its true step and by seconds; not finite values become null."""
        seconds = self.control.clock.now()
        self.last_step = trainer.global_step
        self.last |= figures
        if not trainer.is_global_zero:
            return
        row = {"step": trainer.global_step, **figures, "wall_seconds": seconds, "tokens_seen": self.tokens_seen}
        line = json_line(row)
        with open(self.path, "ab", buffering=0) as file:
            if file.write(line) < len(line):  # the last bytes of a full disk: no half row, and no next one behind it
                file.truncate(self._num_bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._num_bytes += len(line)
        for logger in trainer.loggers:
            logger.log_metrics(
                {**figures, "wall_seconds": seconds, "tokens_seen": self.tokens_seen}, trainer.global_step
            )
            losses = {f"by_seconds/{name}": value for name, value in figures.items() if name.endswith("/loss")}
            logger.log_metrics(losses, round(seconds))


def rows_to_keep(file: Iterable[bytes], last_step: int, validated: bool) -> int:
    """How many bytes of a metrics.jsonl are whole rows up to `last_step`; its validation counts if `validated`.

    >>> lines = [b'{"step": 1}\\n', b'{"step": 1, "val/loss": 2.5}\\n', b'{"step": 2}\\n', b'{"st']
    >>> [rows_to_keep(lines, step, validated) for step, validated in ((1, False), (1, True), (9, True))]
    [12, 41, 53]
    """
    num_bytes = 0
    for line in file:
        try:
            row = json.loads(line)
        except ValueError:
            break
        redone = not validated and row["step"] == last_step and "val/loss" in row
        if row["step"] > last_step or redone or not line.endswith(b"\n"):
            break
        num_bytes += len(line)
    return num_bytes


def json_line(row: dict[str, float | int]) -> bytes:
    """A row as a line of JSON, which has no NaN and no infinity: null stands for them.

    >>> json_line({"step": 1, "train/loss": float("nan")})
    b'{"step": 1, "train/loss": null}\\n'
    """
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return (json.dumps(finite) + "\n").encode()


# ------------------------------------------------------------------------------------------------------------ showing


class Samples(Callback):
    """A text after each validation, the same prompt and seed each time, for TensorBoard and the end of the run."""

    def __init__(self, control: RunControl) -> None:
        self.control, self.config = control, control.config
        self.text = ""
        self.tokenizer: Tokenizer | None = None  # of the dataset as it is now: it may be prepared anew meanwhile

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load the tokenizer, unless there is nothing to begin a text with."""
        directory = dataset(trainer).directory
        if self.config.sample_tokens and trainer.is_global_zero and directory:
            tokenizer = Tokenizer.from_directory(directory / "tokenizer")
            if self.config.sample_prompt or END_OF_TEXT in tokenizer.special_ids:
                self.tokenizer = tokenizer

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Where time is limited, find out what a text takes: the one at the end must fit in."""
        if self.config.max_minutes is not None:
            began = self.control.clock.now()
            self.write(trainer, pl_module)
            self.control.sample_seconds = self.control.clock.now() - began

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write one."""
        if not trainer.sanity_checking and self.write(trainer, pl_module):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("sample", self.text, trainer.global_step)

    def write(self, trainer: Trainer, pl_module: Any) -> bool:
        """Make the text, where the whole model is at hand."""
        sharded = pl_module.device_mesh is not None
        if self.tokenizer is None or sharded:
            return False
        [text] = generate(
            pl_module.model,
            self.tokenizer,
            self.config.sample_prompt,
            Sampling(temperature=0.8, top_p=0.95, max_new_tokens=self.config.sample_tokens),
        )
        self.text = self.config.sample_prompt + text
        return True


class Progress(ProgressBar):
    """One line that moves in a terminal, else a line every ten seconds: step, loss, tokens/s, time left.

    Args:
        control: gives the time that is left.
        metrics: gives loss and speed.
    """

    def __init__(self, control: RunControl, metrics: MetricsLog) -> None:
        super().__init__()
        self.control, self.metrics = control, metrics
        self.enabled = True
        self._bar: Any = None
        self._shown = 0.0

    def disable(self) -> None:
        """Lightning's switch: on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Lightning's switch."""
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Above the moving line."""
        print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to show."""
        if self.enabled and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(30), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._bar.add_task("starting", total=total, completed=trainer.global_step)
            with self._terminal():
                self._bar.start()

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[None]:
        """In here the bar writes; when its terminal has gone, it is dropped, and nothing is shown any more."""
        try:
            yield
        except OSError:
            discard(sys.stderr)
            self._bar.stop()
            self._bar = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the run is, now and then."""
        now = time.monotonic()
        if not self.enabled or "train/loss" not in self.metrics.last or now - self._shown < (0.25 if self._bar else 10):
            return
        self._shown = now
        if self._bar:
            self._bar.update(
                self._task, completed=trainer.global_step, description=self.line(trainer.global_step, trainer.max_steps)
            )
        else:
            say(self.line(trainer.global_step, trainer.max_steps), error=True)

    def line(self, step: int, max_steps: int) -> str:
        """Step, losses, speed, time left."""
        last = self.metrics.last
        parts = [f"step {step:,}" + (f"/{max_steps:,}" if max_steps > 0 else "")]
        parts.append(f"loss {last['train/loss']:.3f}")
        if "val/loss" in last:
            parts.append(f"val {last['val/loss']:.3f}")
        if "tokens_per_second" in last:
            parts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
        left = self.seconds_left(step, max_steps)
        return " · ".join([*parts, f"{duration(left)} left"] if left is not None else parts)

    def seconds_left(self, step: int, max_steps: int) -> float | None:
        """By the steps that remain at the present speed, or by the time limit if that is sooner."""
        left = []
        if self.control.config.max_minutes is not None:
            left.append(60 * self.control.config.max_minutes - self.control.clock.now())
        if "tokens_per_second" in self.metrics.last and max_steps > 0:
            tokens = self.metrics.tokens_seen / step * (max_steps - step)
            left.append(tokens / self.metrics.last["tokens_per_second"])
        return max(0.0, min(left)) if left else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so."""
        if self._bar:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The figures of a validation stay on the screen."""
        if self.enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            text = f"step {trainer.global_step:,}: {figures(pl_module.validation_result)}"
            if self._bar:
                with self._terminal():
                    self._bar.console.print(text, highlight=False)
            else:
                say(text, error=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the line."""
        if self._bar:
            with self._terminal():
                self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Clear the line."""
        self.on_train_end(trainer, pl_module)


def duration(seconds: float | int) -> str:
    """Hours, minutes and seconds.

    >>> duration(59.6), duration(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def figures(result: dict[str, float]) -> str:
    """The figures of a validation in one line; what the corpus' own entropy is, where it is known.

    >>> figures({"val/loss": 1.5, "val/perplexity": 4.4817, "val/bits_per_byte": 0.75})
    'loss 1.5000 nats per token, perplexity 4.48, 0.7500 bits per byte'
    """
    text = f"loss {result['val/loss']:.4f} nats per token, perplexity {result['val/perplexity']:.2f}"
    if "val/bits_per_byte" in result:
        text += f", {result['val/bits_per_byte']:.4f} bits per byte"
    if "val/entropy_bits_per_byte" in result:
        text += f" (no model can get below {result['val/entropy_bits_per_byte']:.4f})"
    return text


# --------------------------------------------------------------------------------------------------------- the record


class RunRecord(Callback):
    """The run's header on the screen, a copy of its tokenizer, and at the end `summary.json` and the hparams tab."""

    def __init__(self, control: RunControl, metrics: MetricsLog) -> None:
        self.control, self.metrics = control, metrics

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what is going to happen; make the run's folder complete in itself."""
        if not trainer.is_global_zero:
            return
        source = dataset(trainer).directory / "tokenizer"
        shutil.copytree(source, self.control.directory / "tokenizer", dirs_exist_ok=True)
        say(header(trainer, pl_module, self.control))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The run came to its end; one that had come to it before keeps the summary of then."""
        if trainer.is_global_zero and not (self.control.was_idle(trainer) and self._is_finished(trainer.global_step)):
            self.write(trainer, pl_module, "finished")

    def _is_finished(self, step: int) -> bool:
        try:
            summary = json.loads((self.control.directory / "summary.json").read_bytes())
        except (OSError, ValueError):
            return False
        return summary["status"] == "finished" and summary["steps"] == step

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """The run was ended; by a full disk, say, on which a summary that cannot be written must not hide that."""
        if trainer.state.fn == "fit" and hasattr(pl_module, "model"):
            with contextlib.suppress(OSError):
                self.write(trainer, pl_module, exception.status if isinstance(exception, Stopped) else "failed")

    def write(self, trainer: Trainer, module: LanguageModel, status: str) -> None:
        """Write summary.json and the run's line in TensorBoard's hparams tab."""
        if not trainer.is_global_zero:
            return
        control, config = self.control, self.control.config
        settings = hyperparameters(trainer, module)
        summary = {
            "status": status,
            "steps": trainer.global_step,
            "tokens": self.metrics.tokens_seen,
            "parameters": num_parameters(module.transformer),
            "val_loss": control.last_loss,
            "best_val_loss": control.best_loss,
            "used_seconds": control.clock.now(),
            "budget_seconds": None if config.max_minutes is None else 60 * config.max_minutes,
            "reserve_seconds": None if config.max_minutes is None else control.reserve_seconds,
            "validation": module.validation_result,
            "directory": str(control.directory),
            "checkpoint": None if control.saved is None else str(control.saved),
            "settings": settings,
        }
        with atomic_write(control.directory / "summary.json", "w") as file:
            json.dump(summary, file, indent=1)
        for logger in trainer.loggers:
            losses = {"hp/val_loss": control.last_loss, "hp/best_val_loss": control.best_loss}
            known = {name: loss for name, loss in losses.items() if loss is not None}
            logger.log_hyperparams(settings, **({"metrics": known} if isinstance(logger, TensorBoardLogger) else {}))
            logger.save()


def dataset(trainer: Trainer) -> Any:
    """The run's data module."""
    return trainer.datamodule  # type: ignore[attr-defined]


EXPECTED_MFU = 0.4  # share of the device's speed in matrix products that a training step reaches


def hyperparameters(trainer: Trainer, module: LanguageModel) -> dict[str, Any]:
    """What makes the run, as one level of plain values."""
    sections = {
        "transformer": asdict(module.transformer),
        "optimizer": asdict(module.optimizer_config),
        "schedule": asdict(module.schedule),
    }
    settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    settings["batch_size"] = dataset(trainer).batch_size
    settings["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    settings["world_size"] = trainer.world_size
    settings["max_steps"] = trainer.max_steps
    settings["precision"] = str(trainer.precision)
    return settings | ({"init_from": module.init_from} if module.init_from else {})


def header(trainer: Trainer, module: LanguageModel, control: RunControl) -> str:
    """What a run is made of and what it will take, in a few lines."""
    config, data = module.transformer, dataset(trainer)
    tokens_per_step = data.batch_size * data.context_length * trainer.accumulate_grad_batches * trainer.world_size
    splits = {name: split["num_tokens"] for name, split in data.meta["splits"].items()}
    parameters, flops = num_parameters(config), flops_per_token(config)
    device = device_name(trainer.strategy.root_device)
    kind: DeviceType = "cuda" if trainer.strategy.root_device.type == "cuda" else "cpu"
    memory = training_memory_bytes(config, data.batch_size, memory_precision(trainer), kind)
    length = f"{trainer.max_steps:,} steps" if trainer.max_steps > 0 else "steps"
    if control.config.max_minutes is not None:
        length += f" or {duration(60 * control.config.max_minutes)}"
    cost = f"{flops / 1e6:,.1f} MFLOP per token, about {memory / 1e9:.2g} GB per device"
    if trainer.max_steps > 0:
        total = tokens_per_step * trainer.max_steps
        length += f", {total:,} tokens in all ({total / parameters:,.1f} per parameter)"
        steps_left = trainer.max_steps - trainer.global_step
        seconds = flops * tokens_per_step * steps_left / (EXPECTED_MFU * device_flops(trainer) * trainer.world_size)
        cost += f", about {duration(seconds)} at {EXPECTED_MFU:.0%} of the device's speed"
    lines = {
        "run": f"{control.directory}" + (f", from step {trainer.global_step:,}" if trainer.global_step else ""),
        "data": f"{data.directory}: " + ", ".join(f"{name} {num:,} tokens" for name, num in splits.items()),
        "model": f"{parameters:,} parameters: {config.num_layers} layers, d_model {config.d_model}, "
        f"{config.num_heads} heads, d_ff {config.d_ff}, vocabulary {config.vocab_size:,}, "
        f"context {config.context_length}",
        "train": f"{length}; {tokens_per_step:,} tokens per step; {trainer.world_size} x {device}, {trainer.precision}",
        "cost": cost,
    }
    if module.init_from and trainer.ckpt_path is None:
        lines["model"] += f"; its weights are those of {module.init_from}"
    return "\n".join(f"{name:<6}{line}" for name, line in lines.items())


def memory_precision(trainer: Trainer) -> Any:
    """The precision in the words of `accounting.training_memory_bytes`."""
    precision = str(trainer.precision)
    return precision if precision in ("bf16-mixed", "bf16-true") else "32-true"


def device_flops(trainer: Trainer) -> float:
    """The device's peak in FLOP/s; where no data sheet is known, what it does in a product that is timed here."""
    device = trainer.strategy.root_device
    peak = peak_flops(device_name(device), matmul_dtype(str(trainer.precision)))
    return peak or matmul_flops(device, torch.float32, size=768)
