"""When a run saves and ends: its last step, its time, a signal, a loss that is not finite."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lm import DIVERGED_EXIT_CODE
from lm.accounting import num_parameters
from lm.checkpoint import (
    check_folder,
    lock_run,
    note_metrics,
    noted_metrics,
    prune,
    recover,
    rng_state,
    set_rng_state,
)
from lm.generate import LONGEST
from lm.module import LanguageModel
from lm.options import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class RunConfig:
    """How a run is kept, watched and ended.

    Attributes:
        name: the run's folder, `<logs>/<name>/version_k`, below `logs`; default, that of the corpus.
        logs: where the runs are.
        max_minutes: wall-clock from the start of the process to its end, final checkpoint and validation included;
            what a resumed run used before counts.
        validate_every_n_steps: updates between validations; a checkpoint is written before each.
        checkpoint_every_n_steps: updates between further checkpoints; default, none.
        keep_checkpoints: the newest ones that stay, beside the best.
        timeout_minutes: how long a rank waits for the others before it gives up.
        sync_every_n_steps: updates between the ranks' agreements (signals, clock), with one process on a GPU between
            checks for NaN.
        sample_prompt: what the sample texts start with.
        sample_tokens: their length; 0 for none.
        bundle: "leaderboard" gathers at the end what one hands in there, in the run's folder (lm/bundle.py).

    Raises:
        ValueError: a setting is out of its range.
    """

    name: str | None = None
    logs: str = "logs"
    max_minutes: float | int | None = None
    validate_every_n_steps: int = 500
    checkpoint_every_n_steps: int | None = None
    keep_checkpoints: int = 2
    timeout_minutes: float | int = 10
    sync_every_n_steps: int = 10
    sample_prompt: str = ""
    sample_tokens: int = 128
    bundle: Literal["none", "leaderboard"] = "none"

    def __post_init__(self) -> None:
        for name in ("validate_every_n_steps", "keep_checkpoints", "timeout_minutes", "sync_every_n_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("max_minutes", "checkpoint_every_n_steps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.sample_tokens <= LONGEST:
            raise ValueError(f"sample_tokens={self.sample_tokens} must be from 0 to {LONGEST:,}")
        place = Path("run" if self.name is None else self.name)
        if not place.parts or place.is_absolute() or ".." in place.parts:
            raise ValueError(f"name={self.name!r} must be a name, not a path: --run.logs says where")


class Stopped(BaseException):  # not an Exception: no library on the way may take it for one of its own errors
    """Ends the process before its time.

    Attributes:
        status: what the run's summary says.
        exit_code: of the process: 128 + the signal, 3 for a run that diverged, 1 for one that failed.
    """

    def __init__(self, status: str, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.exit_code = status, exit_code

    @classmethod
    def by_signal(cls, signum: int) -> "Stopped":
        """The end that a signal asks for."""
        return cls("stopped", 128 + signum, f"stopped by {signal.Signals(signum).name}")


class Signals:
    """Turns signals into a flag while `deferred`, into `Stopped` at once before and after.

    A second Ctrl-C while the first waits ends the process on the spot.

    Attributes:
        received: the first one that was deferred; 0 for none.
        deferred: they wait for the end of the update.
        joined: the ranks train, and end together: none has to tell the first one that it does.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False
        self.joined = False
        self.launcher: Any = None  # Lightning's, with the other ranks if this process started them
        self._before: dict[int, Any] = {}

    @property
    def children(self) -> Sequence["subprocess.Popen[bytes]"]:
        """The other ranks, if this process started them."""
        return getattr(self.launcher, "procs", ())

    def install(self) -> None:
        """Take the signals over, again if some library took them since; ignored ones (nohup) stay ignored."""
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before = signal.signal(signum, self._handle)
                self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Give the signals back to who had them before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _handle(self, signum: int, frame: Any) -> None:
        if not self.deferred:
            self.deferred = True  # one exception is enough
            raise Stopped.by_signal(signum)
        if self.received and signum == signal.SIGINT:
            for child in self.children:
                child.kill()
            os._exit(128 + signum)
        if not self.received and signum == signal.SIGINT and sys.stderr is not None:  # or 2 may be any file
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing this step and saving; Ctrl-C again leaves at once\n")
        self.received = self.received or signum


def max_over_ranks(trainer: Trainer, values: list[float]) -> list[float]:
    """The greatest of each value over all ranks, the same on each."""
    if trainer.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


class Clock:
    """Seconds of this run, those before a resume included, and how long a step takes; the same on all ranks.

    Between two agreements of the ranks each of them reckons the time from the number of steps alone: had they looked
    at their own clocks, they would use different learning rates and stop at different steps.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.previous = 0.0
        self.agreed = (0, 0.0, 0.0)  # step, seconds, seconds of pauses
        self.step_seconds = 0.0

    def now(self) -> float:
        """Seconds on this rank."""
        return self.previous + time.monotonic() - self.started

    def agree(self, step: int, seconds: float, paused: float) -> None:
        """Take over what the ranks have agreed on at `step`: the time, and how much of it was no training."""
        before, then, paused_then = self.agreed
        if step > before > 0:
            self.step_seconds = (seconds - then - (paused - paused_then)) / (step - before)
        self.agreed = (step, seconds, paused)

    def at(self, step: int) -> float:
        """Seconds at the end of `step`."""
        return self.agreed[1] + (step - self.agreed[0]) * self.step_seconds


class RunControl(Checkpoint):
    """Saves, and ends the run: at `max_steps`, when its time is up, on a signal, on a loss that is not finite.

    Everything happens between two updates, on all ranks at the same one. The order at the end is checkpoint, then
    validation, so that an interrupted validation costs nothing but itself: resumed, the run does it first.

    Args:
        config: the run's settings.
        started: `time.monotonic()` when the process began.
        signals: the process's signals; default, taken over when training begins.
    """

    def __init__(self, config: RunConfig, started: float | None = None, signals: Signals | None = None) -> None:
        self.config = config
        self.clock = Clock(time.monotonic() if started is None else started)
        self.signals = signals or Signals()
        self.validation_pending = False
        self.validation_seconds = 0.0
        self.num_validations = 0  # whole ones of this process
        self.sample_seconds = 0.0  # of a text, tried out at the start: each validation ends with one
        self.save_seconds = 0.0
        self.best_loss: float | None = None
        self.last_loss: float | None = None
        self.paused_seconds = 0.0  # by validations and saving
        self.reserve_seconds = 0.0  # kept back for the last checkpoint and validation; agreed by all ranks
        self._began = 0.0
        self._after_pause = False
        self._restored_rng: dict[str, Any] | None = None
        self.lock: IO[str] | None = None
        self.saved: Path | None = None
        self.resumed_step: int | None = None  # of the checkpoint in its own folder that the run goes on from
        self._noted: dict[str, float] = {}  # what was measured on it after it was written
        self.training_began: float | None = None  # seconds of the run
        self.used_up: float | None = None  # the minutes that were over at the last update
        self._agreed_signal = 0

    # ---------------------------------------------------------------------------------------------------- begin

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Claim the run's folder: two runs in one would destroy each other's files. See that checkpoints fit in."""
        self.directory = Path(trainer.log_dir or trainer.default_root_dir)
        if stage == "fit" and trainer.is_global_zero:
            if self.lock is None:
                self.lock = lock_run(self.directory)
            # Parameters and two moments in float32; a checkpoint is written whole before an older one goes.
            check_folder(self.directory, 2 * 12 * num_parameters(pl_module.transformer))
            recover(self.directory)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Signals are ours from here on."""
        self._take_signals()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Reckon from the few batches tried how long a whole validation takes, with the text at its end."""
        tried = sum(min(trainer.num_sanity_val_steps, n) for n in trainer.num_val_batches)
        self.validation_seconds *= sum(trainer.num_val_batches) / max(1, tried - 1)
        self.validation_seconds += self.sample_seconds
        pl_module.validation_result = {}  # of a few batches before the first update

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the signals, go on with the random numbers; with a time limit, measure what saving takes."""
        self._take_signals()
        # Lightning broadcasts a flag for SIGTERM and waits for it at every step; ours travels with the clock.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self._restored_rng is not None:
            set_rng_state(self._restored_rng)
        self._synchronise(trainer, pl_module, trainer.global_step)
        if self.training_began is None:
            self.training_began = self.clock.at(trainer.global_step)
        if self.config.max_minutes is not None:
            if self.save_seconds == 0:
                self.save(trainer)
                self._synchronise(trainer, pl_module, trainer.global_step)
            over = self.used_up is not None and self.config.max_minutes <= self.used_up
            trainer.should_stop = over or self._time_is_up(trainer.global_step)
        self._follow_the_clock(pl_module, trainer.global_step)

    def _take_signals(self) -> None:
        self.signals.install()
        self.signals.deferred = self.signals.joined = True

    # ----------------------------------------------------------------------------------------------------- steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an update: agree with the other ranks, save, end."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        every = self.config.checkpoint_every_n_steps
        validating = self._validates(trainer, step)
        # Something else may have ended the run: a `trainer.max_time`, say.
        ending = trainer.should_stop or 0 < trainer.max_steps <= step or self._time_is_up(step, validating)
        saving = validating or ending or (every is not None and step % every == 0)
        if saving or self._after_pause or step % self._sync_every(trainer) == 0:
            self._synchronise(trainer, pl_module, step)
            ending = ending or self._time_is_up(step, validating)
        self._follow_the_clock(pl_module, step)
        self.used_up = self.config.max_minutes if self._time_is_up(step, validating) else None
        self.validation_pending = validating or (ending and trainer.enable_validation)
        if saving or ending or self._agreed_signal:
            self.save(trainer)
        if self._agreed_signal:
            self._leave(self._agreed_signal)
        trainer.should_stop = ending

    def _leave(self, signum: int) -> NoReturn:
        """End the run on a signal; the checkpoint has been written."""
        stop = Stopped.by_signal(signum)
        if self.saved is not None:
            stop.args = (f"{stop}; {self.saved} is written: the same command with --resume auto goes on from there",)
        raise stop

    def _sync_every(self, trainer: Trainer) -> int:
        alone = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        return 1 if alone else self.config.sync_every_n_steps

    def _synchronise(self, trainer: Trainer, module: LanguageModel, step: int) -> None:
        diverged = float(module.nonfinite.item())  # first: it waits for the device, and the clock counts that
        local = [
            self.clock.now(),
            self.paused_seconds,
            float(self.signals.received),
            diverged,
            self.validation_seconds + self.save_seconds,
        ]
        seconds, paused, signum, nonfinite, last_pause = max_over_ranks(trainer, local)
        self.clock.agree(step, seconds, paused)
        self.reserve_seconds = 1.0 + 1.25 * last_pause  # as long as they took so far, and a quarter more
        self._agreed_signal = int(signum)
        self._after_pause = False
        if nonfinite:
            raise Stopped("diverged", DIVERGED_EXIT_CODE, f"the loss or a gradient is not finite at step {step}")

    @property
    def _training_seconds(self) -> float:
        assert self.config.max_minutes is not None
        return max(1e-3, 60 * self.config.max_minutes - self.reserve_seconds)

    def _follow_the_clock(self, module: Any, step: int) -> None:
        """Set the rate of the update after `step`: that of the time at its end, of the run's end if it is the last.

        What came before the first update, such as encoding the corpus, is part of the limit but not of the schedule.
        """
        if self.config.max_minutes is not None:
            began = self.training_began or 0.0
            last = self._time_is_up(step + 1, self._validates(module.trainer, step + 1))
            share = (self.clock.at(step + 1) - began) / max(1e-3, self._training_seconds - began)
            module.clock_progress = 1.0 if last else share
            module.lr_schedulers().apply()  # Lightning has set it already, by what was known an update ago

    def _validates(self, trainer: Trainer, step: int) -> bool:
        return trainer.enable_validation and step % self.config.validate_every_n_steps == 0

    def _time_is_up(self, step: int, validating: bool = False) -> bool:
        """Whether no further update fits in after `step`, and after the validation that follows it."""
        if self.config.max_minutes is None:
            return False
        pause = self.reserve_seconds if validating else 0.0
        return self.clock.at(step) + pause + self.clock.step_seconds > self._training_seconds

    # ------------------------------------------------------------------------------------------------ validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure it."""
        self._began = self._first_batch_done = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave on a signal: the checkpoint was written before, and says that this validation is still to be done."""
        if batch_idx == 0:
            self._first_batch_done = time.monotonic()
        if not self.signals.deferred or batch_idx % self._sync_every(trainer):
            return
        (signum,) = max_over_ranks(trainer, [float(self.signals.received)])
        if signum:
            self._leave(int(signum))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the loss, and whether it is the best so far."""
        seconds = time.monotonic() - self._began
        if trainer.sanity_checking:  # the first batch may have been the one that everything is compiled for
            self.validation_seconds = time.monotonic() - self._first_batch_done
            return
        # A measured one counts more than one reckoned, or the first, which may have compiled something.
        self.validation_seconds = seconds if self.num_validations < 2 else max(self.validation_seconds, seconds)
        self.num_validations += 1
        self.paused_seconds += seconds
        self._after_pause = True
        self._take_loss(pl_module.validation_result["val/loss"])
        if trainer.is_global_zero and self.saved is not None and self.saved == self._path(trainer):
            note_metrics(self.saved, pl_module.validation_result)
            prune(self.directory, self.config.keep_checkpoints)
        if self.config.max_minutes is not None and trainer.state.fn == "fit":
            self._synchronise(trainer, pl_module, trainer.global_step)
            # It took longer than reckoned: another update would only ask for another validation.
            trainer.should_stop = trainer.should_stop or self._time_is_up(trainer.global_step)

    def _take_loss(self, loss: float) -> None:
        self.validation_pending = False
        self.last_loss = loss
        self.best_loss = loss if self.best_loss is None else min(self.best_loss, loss)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, trainer: Trainer) -> None:
        """Write `checkpoints/step-000500.ckpt`, unless this step has it, and drop those that are no longer kept."""
        began = time.monotonic()
        path = self._path(trainer)
        if self.saved == path:
            return
        trainer.save_checkpoint(path)
        self.saved = path
        if trainer.is_global_zero:
            prune(self.directory, self.config.keep_checkpoints)
        seconds = time.monotonic() - began
        self.save_seconds = max(self.save_seconds, seconds)
        self.paused_seconds += seconds
        self._after_pause = True

    def _path(self, trainer: Trainer) -> Path:
        return self.directory / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "seconds": self.clock.now() + self.save_seconds,  # this very save has yet to be written
            "training_began": self.training_began,
            "used_up": self.used_up,
            "validation_pending": self.validation_pending,
            "validation_seconds": self.validation_seconds,
            "save_seconds": self.save_seconds,
            "best_loss": self.best_loss,
            "last_loss": self.last_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.clock.previous = state["seconds"]
        self.training_began = state.get("training_began", 0.0)  # a checkpoint from before it was kept
        self.used_up = state.get("used_up")
        self.validation_pending = state["validation_pending"]
        self.validation_seconds, self.save_seconds = state["validation_seconds"], state["save_seconds"]
        self.best_loss, self.last_loss = state["best_loss"], state["last_loss"]
        if "val/loss" in self._noted:
            self.clock.previous += self.validation_seconds
            self._take_loss(self._noted["val/loss"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random number generators; write Lightning's counters as they are between two updates."""
        checkpoint["rng"] = rng_state()
        due = trainer.global_step % self.config.validate_every_n_steps == 0
        settle_loops(checkpoint["loops"]["fit_loop"], due, self.validation_pending)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random number generators' states until training begins: the set-up draws from them."""
        self._restored_rng = checkpoint.get("rng")
        path = Path(str(trainer.ckpt_path))
        if path.resolve().parent == (self.directory / "checkpoints").resolve():
            self.saved = self.directory / "checkpoints" / path.name  # what a validation still due is noted beside
            self.resumed_step = checkpoint["global_step"]
            self._noted = noted_metrics(self.saved)
        if trainer.state.fn == "fit" and "loops" in checkpoint:
            fit_loop = checkpoint["loops"]["fit_loop"]
            recount_batches(fit_loop, checkpoint["global_step"] * trainer.accumulate_grad_batches)
            if "val/loss" in self._noted:
                count_validation(fit_loop, pending=False)
                pl_module.validation_result = self._noted  # type: ignore[assignment]

    # -------------------------------------------------------------------------------------------------------- end

    def was_idle(self, trainer: Trainer) -> bool:
        """Whether this process found a run with nothing left to do: neither an update nor a validation."""
        return self.resumed_step == trainer.global_step and not (self.validation_pending or self.num_validations)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what an epoch's end, say, has left unsaved; from then on signals end the process at once again."""
        if trainer.global_step > 0 and self.saved != self._path(trainer):
            self.validation_pending = trainer.enable_validation
            self.save(trainer)
        self.signals.deferred = False

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the folder back: after an exception Lightning calls no `teardown`."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the folder back."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def requeue_job() -> None:
    """Ask SLURM to start this job again: with `--resume auto` it goes on from its last checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"could not requeue job {job}: {error}", error=True)


def settle_loops(fit_loop: dict[str, Any], validation_due: bool, validation_pending: bool) -> None:
    """Make the counters of Lightning's loops say: this update is complete, and its validation done or to be done.

    Saved within `on_train_batch_end` they say that the last batch is not complete, and a resumed run skips the
    validation that was due at this step.

    Args:
        fit_loop: the state of the loops, changed in place.
        validation_due: the loop validates after this step; resumed, it passes there again and counts the step then.
        validation_pending: it has not done so yet.
    """
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += not validation_due
    batches = fit_loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
    count_validation(fit_loop, validation_pending)


def count_validation(fit_loop: dict[str, Any], pending: bool) -> None:
    """Make the counters of Lightning's loops say whether the validation of this step is to be done, or none is."""
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        begun = int(pending)  # one batch begun, none done: Lightning takes the validation up again
        validation[part].update(ready=begun, started=begun, processed=0, completed=0)


def recount_batches(fit_loop: dict[str, Any], num_batches: int) -> None:
    """Make the counters of Lightning's loops say that so many batches are done: as if each update had taken as many.

    They decide when an update is complete and a validation due, which a run that goes on with another
    `accumulate_grad_batches` would otherwise get wrong.

    Args:
        fit_loop: the state of the loops, changed in place.
        num_batches: updates so far, times the batches of an update from now on.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    if progress["current"]["processed"] == progress["total"]["processed"] != num_batches:
        for part in ("total", "current"):
            progress[part] = dict.fromkeys(progress[part], num_batches)
