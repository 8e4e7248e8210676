"""What is wrong with the settings of a run, as far as it can be known before any data is touched: one line each."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from lm.checkpoint import CheckpointError, check_folder, glance_at, peek
from lm.control import RunConfig
from lm.model import SAME_WEIGHTS, TransformerConfig
from lm.module import OptimizerConfig, ScheduleConfig, differences, uses_cuda_graphs
from lm.options import is_first_rank
from lm.prepare import load_tokenizer
from lm.ranks import num_devices
from lm.texts import list_files

STRATEGIES = ("auto", "ddp", "fsdp2")


def find_problems(config: Namespace, subcommand: str) -> list[str]:
    """Everything that is wrong with the settings together, one line each; nothing is built, no data is read."""
    problems = []
    vocab_size = 1 if config.data.vocab_size is None else config.data.vocab_size
    sections: list[tuple[str, Any, dict[str, Any]]] = [
        ("model.transformer", TransformerConfig, {"vocab_size": vocab_size}),
        ("model.optimizer", OptimizerConfig, {}),
        ("model.schedule", ScheduleConfig, {}),
        ("run", RunConfig, {}),
    ]
    for key, section, linked in sections:
        try:
            section(**config[key].as_dict() | linked)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    trainer, data, schedule = config.trainer, config.data, config.model.schedule
    if subcommand == "fit":
        problems += run_problems(trainer, schedule, config.run) + update_problems(trainer, config.model)
    problems += data_problems(data)
    if not 0 <= config.seed_everything < 2**32:
        problems.append(f"seed_everything={config.seed_everything} must be from 0 to {2**32 - 1}")
    if uses_cuda_graphs(config.model.compile) and trainer.accumulate_grad_batches > 1:
        problems.append(
            f"model.compile={config.model.compile} with trainer.accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}: each batch would overwrite the gradients of the one before; "
            "use --model.compile true"
        )
    if config.ckpt_path is not None:
        problems += checkpoint_problems(Path(config.ckpt_path))
    return problems + device_problems(trainer) + process_problems(trainer)


def data_problems(data: Namespace) -> list[str]:
    """What is wrong with the data's settings and the names of its texts."""
    problems = [
        f"data.{name}={data[name]} must be at least 1"
        for name in ("context_length", "val_context_length", "batch_size", "val_batch_size")
        if data[name] is not None and data[name] < 1
    ]
    if data.directory is None and data.tokenizer is not None and not Path(data.tokenizer).is_dir():
        problems.append(f"data.tokenizer: there is no folder {data.tokenizer}")
    for name in ("train_text", "valid_text"):
        if data.directory is None and data[name] is not None and not Path(data[name]).is_file():
            problems += text_problems(name, Path(data[name]))
    if (data.val_context_length or 0) > data.context_length:
        problems.append(
            f"data.val_context_length={data.val_context_length} is longer than data.context_length="
            f"{data.context_length}: the model takes no more tokens than that at once"
        )
    return problems


def text_problems(name: str, text: Path) -> list[str]:
    """What is wrong with a text that is no file."""
    if not text.is_dir():
        return [f"data.{name}: there is no file {text}"]
    try:
        list_files(text)
    except (ValueError, OSError) as error:
        return [f"data.{name}: {error}"]
    return []


def checkpoint_problems(path: Path, name: str = "ckpt_path") -> list[str]:
    """Whether a checkpoint can be seen at a glance to be none; all of it is checked when it is loaded."""
    if not path.is_file():
        return [f"{name}: there is no file {path}"]
    try:
        glance_at(path)
    except CheckpointError as error:
        return [f"{name}: {error}"]
    return []


def beginning_problems(config: Namespace) -> list[str]:
    """What is wrong with the checkpoint that a run's weights begin with, of which no weight is read here."""
    path, data = config.model.init_from, config.data
    if config.run.bundle == "leaderboard":
        return [f"model.init_from={path} with run.bundle=leaderboard: what is handed in there begins from nothing"]
    try:
        saved, fingerprint = peek(path)
        current = config.model.transformer.as_dict()
        changed = differences(asdict(saved), current, {*SAME_WEIGHTS, "vocab_size", "context_length"})
        if changed:
            return [f"model.init_from={path} is of another model: {'; '.join(changed)}"]
        tokenizer = Path(data.directory) / "tokenizer" if data.directory else data.tokenizer
        if tokenizer is None or fingerprint.get("tokenizer_sha256") == load_tokenizer(tokenizer).sha256:
            return []
    except (OSError, ValueError) as error:
        return [f"model.init_from: {error}"]
    return [f"model.init_from={path} was trained with another tokenizer than {tokenizer}: its ids mean other tokens"]


def run_problems(trainer: Namespace, schedule: Namespace, run: Namespace) -> list[str]:
    """What is wrong with a run's length."""
    problems = []
    if trainer.max_steps == -1 and run.max_minutes is None:
        problems.append(f"trainer.max_steps={trainer.max_steps} without run.max_minutes: the run would never end")
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        problems.append(f"trainer.max_steps={trainer.max_steps} must be at least 1, or -1 to be ended by the clock")
    if 0 < trainer.max_steps <= schedule.warmup_steps:
        problems.append(
            f"model.schedule.warmup_steps={schedule.warmup_steps} must be less than trainer.max_steps="
            f"{trainer.max_steps}: the learning rate would never reach its highest value"
        )
    if schedule.follow == "clock" and run.max_minutes is None:
        problems.append("model.schedule.follow=clock needs run.max_minutes: there is no clock to follow")
    if schedule.follow == "steps" and trainer.max_steps == -1:
        problems.append("model.schedule.follow=steps needs trainer.max_steps: set it, or follow the clock")
    if run.max_minutes is not None and trainer.num_sanity_val_steps in (0, 1):
        problems.append(
            f"trainer.num_sanity_val_steps={trainer.num_sanity_val_steps} with run.max_minutes: the time of the last "
            "validation is reckoned from them; leave it out"
        )
    if trainer.logger is False:
        problems.append("trainer.logger=false: the run's folder is its logger's; leave it out")
    try:
        if is_first_rank():
            check_folder(Path(run.logs))
    except OSError as error:
        problems.append(f"run.logs: {error.strerror or error}")
    return problems


def update_problems(trainer: Namespace, model: Namespace) -> list[str]:
    """What no update can do."""
    problems = [
        f"trainer.{name}={trainer[name]} must be at least 1"
        for name in ("accumulate_grad_batches", "log_every_n_steps")
        if trainer[name] is not None and trainer[name] < 1
    ]
    problems += [
        f"trainer.{name}={trainer[name]:g}: the run would end before its first update; leave it out"
        for name in ("max_epochs", "limit_train_batches")
        if trainer[name] == 0
    ]
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        problems.append(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val:g} must be above 0, or 0 for no clipping"
        )
    if trainer.overfit_batches:
        problems.append(f"trainer.overfit_batches={trainer.overfit_batches}: train on a short text instead")
    if trainer.gradient_clip_algorithm == "value":
        problems.append(
            "trainer.gradient_clip_algorithm=value: only the norm of all gradients can be clipped; leave it out"
        )
    if trainer.barebones:
        problems.append("trainer.barebones=true: it would leave out checkpoints and the log; leave it out")
    if isinstance(trainer.strategy, str) and trainer.strategy not in STRATEGIES:
        problems.append(f"trainer.strategy={trainer.strategy}: use one of {', '.join(STRATEGIES)}")
    if model.optimizer.head_lr is not None and model.transformer.head == "tied":
        problems.append(
            f"model.optimizer.head_lr={model.optimizer.head_lr}, but model.transformer.head=tied has none of its own: "
            "use --model.optimizer.embedding_lr"
        )
    if model.optimizer.matrices == "muon" and trainer.strategy == "fsdp2":
        problems.append(
            "model.optimizer.matrices=muon needs whole matrices, and FSDP cuts them: use --trainer.strategy ddp"
        )
    return problems


def device_problems(trainer: Namespace) -> list[str]:
    """A device or precision that this machine lacks."""
    problems = []
    on_cuda = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    if trainer.accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        problems.append(f"trainer.accelerator={trainer.accelerator}: this machine has none; use cpu or auto")
    if trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        problems.append("trainer.accelerator=mps: this machine has none; use cpu or auto")
    if trainer.accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
        problems.append(f"trainer.accelerator={trainer.accelerator}: use auto, cpu, cuda or mps")
    if on_cuda and num_devices(trainer.devices) > torch.cuda.device_count() > 0:
        problems.append(f"trainer.devices={trainer.devices}: this machine has {torch.cuda.device_count()}")
    if str(trainer.precision) == "16-true":
        problems.append(
            "trainer.precision=16-true cannot train, AdamW's eps is 0 in float16: use 16-mixed or bf16-true"
        )
    elif str(trainer.precision).startswith(("16", "transformer-engine")) and not on_cuda:
        problems.append(f"trainer.precision={trainer.precision} needs a GPU: use 32-true or bf16-mixed")
    return problems


def process_problems(trainer: Namespace) -> list[str]:
    """More processes, started from outside, than the Trainer takes for ranks: each would make a run of its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        starter, names = "torchrun", ("WORLD_SIZE", "GROUP_WORLD_SIZE")
    elif os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # in which Lightning does not ask SLURM
        # SLURM_NTASKS is what the job may start: a script that calls python without srun is one process all the same.
        starter, names = "srun", ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
    else:
        return []
    started, nodes = (int(os.environ.get(name) or 1) for name in names)
    if started <= num_devices(trainer.devices) * trainer.num_nodes:
        return []
    several = f" --trainer.num_nodes {nodes}" if nodes > 1 else ""
    return [
        f"trainer.devices={trainer.devices}: {starter} has started {started} processes, and each would make a run of "
        f"its own; use --trainer.devices {started // nodes}{several}"
    ]
