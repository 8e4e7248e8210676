"""The front door to training: `python -m lm fit` and `validate`, on LightningCLI.

Options come from the code's defaults, then configs/builtin.yaml (or, given a checkpoint, its run's newest
configuration), then each `--config` in order, then the command line. What is wrong with them is said in one line each,
before any data is touched.
"""

import contextlib
import io
import itertools
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lm.accounting import read_settings
from lm.bundle import write_bundle
from lm.callbacks import MetricsLog, Progress, RunRecord, Samples, duration, figures
from lm.checkpoint import (
    AtomicCheckpointIO,
    lock_run,
    newest_checkpoint,
    newest_config,
    run_of,
)
from lm.control import RunConfig, RunControl, Signals, Stopped, requeue_job
from lm.data import TokenDataModule
from lm.defaults import default_configs, discard_inherited, find_beginning, setting, settle
from lm.device import device_name
from lm.module import LanguageModel
from lm.options import discard, fail, is_first_rank, say
from lm.parser import DESCRIPTIONS, Parser, check_sections
from lm.prepare import prepare_validation
from lm.problems import beginning_problems, find_problems
from lm.ranks import end_ranks, end_with, find_culprit, make_strategy, watched_ranks
from lm.report import by_version
from tokenizer.files import atomic_write
from tokenizer.options import in_one_line

PARENT = "LM_PARENT"  # environment variable: the process that started this one

CheckpointIO.register(AtomicCheckpointIO)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # one endless epoch, counted in steps
    "max_steps": 1000,
    "devices": 1,
    "gradient_clip_val": 1.0,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,  # the data module cuts the ranks' shares; Lightning would cut them again
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration into the run's folder; a resumed run's, if it differs, beside that before.

    What belongs to one command only (resume, ckpt_path) is left out, and the dataset's folder is named: the file
    works as it is with `--config`, and `python -m lm validate` takes it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write that of a new run."""
        self.text: str | None = None
        log_dir = trainer.log_dir  # a collective operation
        if stage != "fit" or not trainer.is_global_zero or log_dir is None:
            return
        config = self.config.clone()
        for key in ("resume", "ckpt_path", "weights_only", "config"):
            config.pop(key, None)
        config["data.directory"] = str(trainer.datamodule.directory)  # type: ignore[attr-defined]
        config["data.vocab_size"] = None
        self.run, self.text = Path(log_dir), self.parser.dump(config, skip_none=False)
        if not newest_config(self.run).is_file():
            self._write(self.config_filename)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a resumed run: only here has its checkpoint been found to fit."""
        if self.text is not None and newest_config(self.run).read_text(encoding="utf-8") != self.text:
            self._write(f"config-resumed-{time.strftime('%Y%m%d-%H%M%S')}.yaml")

    def _write(self, name: str) -> None:
        with atomic_write(self.run / name, "w") as file:
            file.write(self.text)


def batches_between_validations(validate_every_n_steps: int, accumulate_grad_batches: int) -> int:
    """Lightning counts batches between validations, we count updates."""
    return validate_every_n_steps * accumulate_grad_batches


class CLI(LightningCLI):
    """`fit` and `validate` with this project's model, data and run control."""

    def __init__(
        self, started: float, signals: Signals, defaults: dict[str, list[str]], argv: list[str] | None = None
    ) -> None:
        """Parse the command line and run what it says.

        Args:
            started: `time.monotonic()` when the process began.
            signals: the process's, installed.
            defaults: configuration files per subcommand, below everything typed.
            argv: the command line; default, the process's own.
        """
        self.started, self.signals, self.defaults = started, signals, defaults
        self.resumed: Path | None = None
        for file in itertools.chain(*defaults.values()):
            check_sections(read_settings(Path(file)), Path(file))
        parsers: dict[str, Any] = {
            name: {
                "usage": f"python -m lm {name} [--config FILE] [--OPTION VALUE]",
                "description": description,
                "default_config_files": defaults.get(name),
            }
            for name, description in DESCRIPTIONS.items()
        }
        super().__init__(
            LanguageModel,
            TokenDataModule,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs=parsers | {"prog": "python -m lm", "description": "Train and validate language models."},
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=argv,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own verbs that make sense here."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: a number, where Lightning's may be drawn, anew for each rank and each time the run goes on."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Of the weights, and of the data's order unless data.seed says otherwise: from 0 to 4294967295.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run section, and what is said once and used in two places."""
        parser.add_class_arguments(RunConfig, "run")
        parser.add_argument(
            "--resume",
            type=Literal["auto", "must", "never"],
            default="never",
            help="Go on with the newest run of this name: if there is one (auto), or fail (must).",
        )
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Of float32 matrix products on a GPU: high uses TF32.",
        )
        parser.link_arguments("data.vocab_size", "model.transformer.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.context_length", "model.transformer.context_length")
        parser.link_arguments(
            ("run.validate_every_n_steps", "trainer.accumulate_grad_batches"),
            "trainer.val_check_interval",
            compute_fn=batches_between_validations,
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning's would let the checkpoint's settings win over what the user typed."""

    def _set_seed(self) -> None:
        """Later, when it is known to be one."""

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work, all of it at once, before any data is touched."""
        discard_inherited(self.defaults)
        config, subcommand = self.config[self.subcommand], str(self.subcommand)
        if problems := settle(config, sys.argv[1:], subcommand) or find_problems(config, subcommand):
            fail(problems)
        if subcommand == "validate" and config.data.valid_text and config.data.train_text is None:
            tokenizer = run_of(config.ckpt_path) / "tokenizer"
            config.data.directory = str(prepare_validation(config.data.valid_text, tokenizer, config.data.data_dir))
            config.data.valid_text = None
        super()._set_seed()
        torch.set_float32_matmul_precision(config.matmul_precision)
        self.lock: IO[str] | None = None
        if subcommand == "fit" and config.resume != "never" and config.ckpt_path is None:
            self._resume(config)
        begins = subcommand == "fit" and config.model.init_from and config.ckpt_path is None
        if begins and (problems := beginning_problems(config)):
            fail(problems)

    def _resume(self, config: Namespace) -> None:
        """Find the newest good checkpoint of the newest run of this name that has one and began like this one."""
        place = Path(config.run.logs) / config.run.name
        first = is_first_rank()
        for version in reversed(by_version(path.parent for path in place.glob("version_*/checkpoints"))):
            beginning = setting(version, "model.init_from")
            if bool(beginning) != bool(config.model.init_from):
                continue
            lock = lock_run(version) if first else None
            try:
                config.ckpt_path = str(newest_checkpoint(version, set_aside=first, unrecorded=True))
            except FileNotFoundError:
                if lock is not None:
                    lock.close()
                continue
            self.resumed, self.lock, config.model.init_from = version, lock, beginning
            if first:
                say(f"resuming {config.ckpt_path}")
            return
        if config.resume == "must":
            fail([f"--resume must: no run in {place} has a good checkpoint; --resume auto starts a new one"])
        if first:
            say(f"nothing to resume in {place}: starting a new run")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our callbacks, logger, checkpoint files and process groups."""
        trainer = self._get(self.config_init, "trainer")
        run: RunConfig = self._get(self.config_init, "run")
        fitting = self.subcommand == "fit"
        self.control = RunControl(run, self.started, self.signals)
        self.control.lock = self.lock
        self.metrics = MetricsLog(self.control)
        self.samples, self.record = Samples(self.control), RunRecord(self.control, self.metrics)
        if fitting and not trainer.fast_dev_run:  # which tries a few batches and writes nothing
            progress = Progress(self.control, self.metrics)
            shown = [progress] if trainer.enable_progress_bar is not False else []
            extra = [self.metrics, self.samples, *shown, self.record, self.control]
            kwargs["callbacks"] = [*as_list(trainer.callbacks), *extra]
        else:
            kwargs |= {"logger": False, "enable_progress_bar": False}
        if fitting and trainer.logger in (None, True):
            version = int(self.resumed.name.split("_")[1]) if self.resumed else None
            kwargs["logger"] = TensorBoardLogger(run.logs, run.name, version, default_hp_metric=False)
        if trainer.profiler in PROFILERS:
            kwargs["profiler"] = PROFILERS[trainer.profiler](filename="profile")
        if isinstance(trainer.strategy, str):
            kwargs["strategy"] = make_strategy(trainer, timedelta(minutes=run.timeout_minutes))
        kwargs["plugins"] = [*as_list(trainer.plugins), AtomicCheckpointIO()]
        built = super().instantiate_trainer(**kwargs)
        self.signals.launcher = built.strategy.launcher
        return built

    def before_fit(self) -> None:
        """Data that cannot be trained on leave no run behind."""
        self.datamodule.check("fit")

    def fit(self, **kwargs: Any) -> None:
        """Train; then make up for a last validation that a signal had cut off."""
        self.trainer.ckpt_path = kwargs.pop("ckpt_path")  # known before the model is made, unlike an argument
        try:
            self.trainer.fit(**kwargs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise Stopped("failed", 1, memory_advice(self.datamodule, self.trainer)) from None
            raise
        if self.control.validation_pending:
            self.metrics.cut(self.trainer)
            self.trainer.ckpt_path = None
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self.record.write(self.trainer, self.model, "finished")

    def after_fit(self) -> None:
        """Say what came out, where it is and what to do with it."""
        if not self.trainer.is_global_zero:
            return
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            say("a batch of training and one of validation went through; nothing was written")
            return
        control, config = self.control, self.control.config
        tokens = f"{self.trainer.global_step:,} steps, {self.metrics.tokens_seen:,} tokens"
        if control.was_idle(self.trainer):
            say(f"\nnothing left to do: finished before, {tokens}")
        else:
            say(f"\nfinished: {tokens}, {duration(control.clock.now())} in all")
        if self.model.validation_result:
            say(f"validation: {figures(self.model.validation_result)}")
        if config.bundle == "leaderboard":
            device = device_name(self.trainer.strategy.root_device)
            bundle = write_bundle(control.directory, self.datamodule.directory, device)
            say(f"to hand in: {bundle}")
        if self.samples.text:
            say(f"sample:\n{indent(self.samples.text)}")
        logs = shlex.quote(config.logs)
        elsewhere = config.logs != RunConfig.logs
        following = {
            f'python -m lm generate{f" --logs {logs}" * elsewhere} --prompt "Once upon a time"': "text from this model",
            f"python -m lm validate{f' --run.logs {logs}' * elsewhere}": "the whole validation set, best checkpoint",
            f"tensorboard --logdir {logs}": "curves, samples, settings",
            "python -m lm fit --data.train_text my.txt": "your own text",
        }
        width = max(map(len, following))
        say(f"everything is in {control.directory}\nnext:")
        for words, purpose in following.items():
            say(f"  {words:<{width}}   {purpose}")

    def validate(self, **kwargs: Any) -> None:
        """The whole validation set."""
        checkpoint = self.trainer.ckpt_path = kwargs.pop("ckpt_path")
        self.trainer.validate(**kwargs | {"verbose": False})
        if self.trainer.is_global_zero:
            print(f"{checkpoint or 'untrained model'}\n{figures(self.model.validation_result)}")


class ParseOnly(CLI):
    """Parses the settings, builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def what_is_refused(commands: list[list[str]]) -> list[list[str]]:
    """What is wrong with each of these command lines of `fit`, as far as it can be known before any data is touched."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
        # The warning is Lightning's, that the process has a command line of its own.
        parsers: dict[Path | None, Any] = {}

        def parse(command: list[str]) -> Namespace:
            beginning = find_beginning(command)
            if beginning not in parsers:
                defaults = default_configs(command, Path(scratch))
                parsers[beginning] = ParseOnly(time.monotonic(), Signals(), defaults, ["fit"]).parser
            return parsers[beginning].parse_args(command).fit

        return [refused(command, parse) for command in commands]


def refused(command: list[str], parse: Callable[[list[str]], Namespace]) -> list[str]:
    """What is wrong with a command line of `fit`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = parse(command)
            return settle(config, command, "fit") or find_problems(config, "fit")
    except SystemExit:
        return [line.removeprefix("error: ") for line in said.getvalue().splitlines()]
    except (OSError, ValueError) as error:
        return [in_one_line(error)]


def as_list(given: Any) -> list[Any]:
    """What the Trainer takes as one thing, several or None."""
    return given if isinstance(given, list) else [] if given is None else [given]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not allocate."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of errors that have no class of their own
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def memory_advice(data: TokenDataModule, trainer: Trainer) -> str:
    """What to try after running out of memory: the same update from smaller batches."""
    batch, accumulate = data.batch_size, trainer.accumulate_grad_batches
    message = f"error: out of memory with data.batch_size={batch}, data.context_length={data.context_length}"
    if batch == 1:
        return f"{message}: try --model.transformer.activation_checkpointing true, or a smaller model"
    return (
        f"{message}: try --data.batch_size {batch // 2} --trainer.accumulate_grad_batches {2 * accumulate} "
        "(the same updates), or --model.transformer.activation_checkpointing true"
    )


def indent(text: str) -> str:
    """A text as a block of its own."""
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


# ------------------------------------------------------------------------------------------------------------ the door


def silence_libraries() -> None:
    """Keep the libraries' advertising and advice off the screen; what matters is said by the run's header."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # reading windows needs none
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # to validate, none are needed
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated.*")  # its successor is new in torch 2.13


def main(argv: list[str], started: float) -> int:
    """Run `fit` or `validate`; the process's exit code.

    0 for a run that came to its end, 2 for settings or data that cannot work, 3 for a run that diverged, 128 + n when
    signal n ended it; 1 for what should not happen: one line about memory, the disk or another rank, otherwise the
    traceback.

    Args:
        argv: the command line after `python -m lm`.
        started: `time.monotonic()` when the process began.
    """
    silence_libraries()
    signals = Signals()
    child = os.environ.get(PARENT) == str(os.getppid())  # a rank that Lightning has started for another process
    if child:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    os.environ[PARENT] = str(os.getpid())
    defaults: dict[str, list[str]] = {}
    try:
        signals.install()
        defaults = default_configs(argv)
        sys.argv[1:] = argv
        with watched_ranks():
            CLI(started, signals, defaults)
    except Stopped as stop:
        if child and signals.joined and stop.status != "failed":
            return 0  # any other code would look like a failure to the first rank, which is still writing
        if stop.exit_code == 128 + signal.SIGUSR1 and is_first_rank() and "SLURM_JOB_ID" in os.environ:
            requeue_job()
        say(str(stop), error=True)
        return stop.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        discard(sys.stdout)
        return 141
    except (ValueError, OSError, MisconfigurationException) as error:
        if signals.deferred and not isinstance(error, OSError):  # while training: a fault, not a setting
            raise
        say(f"error: {in_one_line(error)}", error=True)
        return 1 if signals.deferred else 2
    except RuntimeError as error:
        culprit = find_culprit(signals.children, patience=5)
        if culprit is None and signals.children and "imed out" in str(error):
            culprit = Stopped("failed", 1, f"error: a rank did not answer within run.timeout_minutes: {error}")
        if culprit is None:
            raise
        say(str(culprit), error=True)
        return culprit.exit_code
    finally:
        signals.restore()
        discard_inherited(defaults)  # of settings that were refused
        end_ranks(signals.children)
        os.environ.pop(PARENT)  # what this process starts from now on is no rank
    return 0
