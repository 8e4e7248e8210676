"""The processes of a run on several devices, its ranks: how they are started, watched and ended."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script

from lm.checkpoint import check_checkpoint
from lm.control import SIGNALS, Stopped
from lm.options import say

Ranks = Sequence["subprocess.Popen[bytes]"]  # those that this process has started: 1, 2, ...
PATIENCE = 10.0  # seconds that a rank has to leave by itself


def num_devices(devices: Any) -> int:
    """How many devices `trainer.devices` asks for: a number, a list, or all that there are.

    >>> num_devices("2"), num_devices([0, 3]), num_devices("0,1,2")
    (2, 2, 3)
    """
    if isinstance(devices, list):
        return len(devices)
    words = str(devices).split(",")
    if len(words) > 1:
        return len([word for word in words if word.strip()])
    number = -1 if words[0] == "auto" else int(words[0])
    return number if number >= 0 else max(1, torch.cuda.device_count())


class FullySharded(ModelParallelStrategy):
    """FSDP2 that checks a checkpoint as the others do: Lightning's restores it past our CheckpointIO."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore the model and the optimizer from a file that is whole; the rest of it.

        Raises:
            CheckpointError: damaged.
        """
        return super().load_checkpoint(check_checkpoint(checkpoint_path), weights_only=True)


def make_strategy(trainer: Namespace, timeout: timedelta) -> Any:
    """`ddp` and `fsdp2` with our timeout; several devices are ddp unless said otherwise."""
    world_size = num_devices(trainer.devices) * trainer.num_nodes
    if trainer.strategy == "fsdp2":
        return FullySharded(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )
    if trainer.strategy == "ddp" or (trainer.strategy == "auto" and world_size > 1):
        return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True, broadcast_buffers=False)
    return trainer.strategy


@contextlib.contextmanager
def watched_ranks(patience: float = PATIENCE) -> Iterator[None]:
    """In here a rank that fails ends this process, even if that waits for it in a collective operation for ever.

    It has `patience` seconds to leave by itself and say why. Lightning's watcher, whose place ours takes, kills it
    within five seconds, whatever it is just saying, so that the exit code is none of ours.
    """
    left = threading.Event()

    def watch(ranks: Ranks) -> None:
        while not left.wait(0.5):
            culprit = find_culprit(ranks)
            if culprit is not None and not left.wait(patience):
                say(str(culprit), error=True)
                for rank in ranks:
                    rank.kill()
                os._exit(culprit.exit_code)

    def launch_watcher(child_processes: Ranks) -> None:
        threading.Thread(target=watch, args=[child_processes], daemon=True).start()

    lightnings = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = launch_watcher
    try:
        yield
    finally:
        left.set()
        subprocess_script._launch_process_observer = lightnings


def find_culprit(ranks: Ranks, patience: float = 0.0) -> Stopped | None:
    """The end that a rank which has failed, or does within `patience` seconds, means for all; None if none has."""
    limit = time.monotonic() + patience
    while True:
        for number, rank in enumerate(ranks, start=1):
            if rank.poll():
                return failure(number, rank.returncode)
        if time.monotonic() >= limit:
            return None
        time.sleep(0.05)


def failure(number: int, exit_code: int) -> Stopped:
    """The end that one rank's means for all: that of the signal which ended it, else exit code 1."""
    signum = -exit_code if exit_code < 0 else exit_code - 128  # before it had handlers, or after
    if signum in SIGNALS:
        return Stopped.by_signal(signum)
    return Stopped("failed", 1, f"error: rank {number} ended with exit code {exit_code}; what it said stands above")


def end_ranks(ranks: Ranks) -> None:
    """Wait for the ranks to end by themselves, then end them: in a collective operation one could hang for ever."""
    limit = time.monotonic() + PATIENCE
    for rank in ranks:
        try:
            rank.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone: no rank outlives its run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
