"""The device that everything runs on: which one, what it calls itself, how fast it is, how much memory a step takes."""

import gc
import itertools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is a CUDA GPU where there is one.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device={name}: this machine has none of that name; use cpu or auto") from None
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes allocated on the device at any time during `step`, those from before it not counted."""
    gc.collect()  # not amid the step: what it frees would count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # acc_events=False makes torch 2.10 warn of later cycles, of which there is none.
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in changes), initial=0))


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 1) -> float:
    """FLOP/s of a product of two square matrices: the roof that a training step cannot break through."""
    generator = torch.Generator(device).manual_seed(0)  # a run's own random numbers stay as they are
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    return 2 * size**3 / _best_seconds(lambda: a @ b, device, repeats)


def memory_bandwidth(device: torch.device, num_bytes: int, repeats: int = 1) -> float:
    """Bytes per second that copying a tensor of `num_bytes` reads and writes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_seconds(lambda: target.copy_(source), device, repeats)


def _best_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of one call: the best of five times `repeats` calls."""
    seconds = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        seconds.append((time.perf_counter() - began) / repeats)
    return min(seconds)
