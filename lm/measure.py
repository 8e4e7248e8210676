"""What `python -m lm bench` measures: training, generation, memory, loss curves, and what the machine could do.

All entrants of a comparison take turns in one process, a few steps each, round after round, so that whatever else the
machine does falls on all of them; a ratio is the median over the rounds of the ratio within a round.

A comparison calls `keep` with its result so far, as it grows: its process may be ended before its time.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm import accounting
from lm.device import device_name, matmul_flops, memory_bandwidth, synchronize
from lm.entrants import (
    ADAMW,
    BareLoop,
    Entrant,
    Setting,
    fit_in_rounds,
    make_generators,
    quiet_lightning,
    warmed_up,
    write_dataset,
)
from lm.optim import cosine_schedule

Keep = Callable[[dict[str, Any]], object]

# ------------------------------------------------------------------------------------------------------ comparisons


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare_training(setting: Setting, device: torch.device, rivals: list[Entrant], keep: Keep) -> dict[str, Any]:
    """Tokens per second of all entrants in turns, their ratios, parts and memory; beside the roofline.

    Args:
        setting: what is compared.
        device: where.
        rivals: beside "ours" and "lightning".
        keep: gets the result after each entrant's warming up, with a round of its own, and after each round of all.
    """
    matmul, bandwidth = roofs(setting, device)
    flops_per_token = accounting.flops_per_token(setting.model)
    tokens_per_step = setting.batch_size * setting.model.context_length
    result: dict[str, Any] = {
        "name": setting.name,
        "setting": asdict(setting),
        "num_parameters": accounting.num_parameters(setting.model),
        "tokens_per_step": tokens_per_step,
        "flops_per_token": flops_per_token,
        "matmul_flops": matmul,
        "memory_bytes_per_second": bandwidth,
        "bytes_per_step": least_bytes(setting),
        "roofline_tokens_per_second": matmul / flops_per_token,
        "bandwidth_tokens_per_second": tokens_per_step * bandwidth / least_bytes(setting),
        "predicted_memory_bytes": predicted_memory(setting, device),
        "lost": {},
    }
    alone: dict[Entrant, float] = {}
    rounds: list[dict[Entrant, float]] = []

    def so_far(measured: list[dict[Entrant, float]]) -> dict[str, Any]:
        figures = {"num_rounds": len(measured), "entrants": speeds(setting, device, measured, matmul)}
        if "lightning" in measured[0]:
            figures["lightning_overhead"] = summary([one["lightning"] / one["ours"] - 1 for one in measured])
        return result | figures

    def keep_alone(name: Entrant, seconds: float) -> None:
        alone[name] = seconds
        keep(so_far([alone]))

    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        directory = Path(folder)
        write_dataset(directory, setting.model.vocab_size)
        entrants, result["lost"] = warmed_up(["ours", *rivals], setting, directory, device, keep_alone)

        def round_of_bare_loops(lightning: float | None) -> None:
            turn = {name: entrant.run(setting.steps) for name, entrant in entrants.items()}
            if lightning is not None:  # the turn before its first round has no partner
                rounds.append({"ours": turn.pop("ours"), "lightning": lightning, **turn})
                keep(so_far(rounds))

        fit_in_rounds(setting, directory, device, round_of_bare_loops)
    result |= so_far(rounds)
    for name, entrant in entrants.items():
        if setting.compile != "reduce-overhead":  # CUDA graphs hold their memory from one step to the next
            result["entrants"][name]["peak_memory_bytes"] = entrant.peak_memory()
    keep(result)
    turns = [{name: entrant.parts() for name, entrant in entrants.items()} for _ in range(setting.rounds)]
    for name in entrants:
        result["entrants"][name]["parts_seconds"] = {
            part: statistics.median(turn[name][part] for turn in turns) for part in turns[0][name]
        }
    return result


def speeds(
    setting: Setting, device: torch.device, rounds: list[dict[Entrant, float]], matmul: float
) -> dict[str, dict[str, Any]]:
    """What the entrants' seconds a round come to.

    Tokens per second, MFU, share of `matmul` FLOP/s, and where builtin has been measured, the ratio to it.
    """
    sheet = accounting.peak_flops(device_name(device), accounting.matmul_dtype(setting.precision))
    tokens_per_round = setting.batch_size * setting.model.context_length * setting.steps
    results: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        seconds = [one[name] for one in rounds]
        speed = summary([tokens_per_round / s for s in seconds])
        flops = accounting.flops_per_token(setting.model) * speed["median"]
        results[name] = {
            "tokens_per_second": speed,
            "milliseconds_per_step": 1e3 * statistics.median(seconds) / setting.steps,
            "mfu": flops / sheet if sheet else None,
            "share_of_matmul": flops / matmul,
        }
        if "builtin" in rounds[0]:
            ratios = [one["builtin"] / one[name] for one in rounds]
            results[name]["speed_relative_to_builtin"] = summary(ratios)
    return results


def compare_memory(setting: Setting, device: torch.device, rivals: list[Entrant], keep: Keep) -> dict[str, Any]:
    """Peak memory of one eager step of ours beside what `lm.accounting` predicts, in several ways to compute it."""
    ways: dict[str, dict[str, Any]] = {
        "float32": {"precision": "32-true"},
        "bf16": {"precision": "bf16-mixed"},
        "bf16, library attention": {"precision": "bf16-mixed", "attention": "fused"},
        "bf16, activation checkpointing": {"precision": "bf16-mixed", "activation_checkpointing": True},
    }
    result: dict[str, Any] = {"name": setting.name, "setting": asdict(setting), "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), setting.model.vocab_size)
        for name, way in ways.items():
            precision = way.pop("precision")
            model = dataclasses.replace(setting.model, **way)
            one = dataclasses.replace(setting, model=model, precision=precision, compile=False)
            trainer = BareLoop("ours", one, Path(folder), device)
            trainer.step()  # the optimizer's numbers are there from now on
            predicted, measured = predicted_memory(one, device), trainer.peak_memory()
            result["results"][name] = {"predicted_bytes": predicted, "measured_bytes": measured}
            keep(result)
            del trainer
    return result


def predicted_memory(setting: Setting, device: torch.device) -> int:
    """By `lm.accounting`, for an eager step."""
    kind: accounting.DeviceType = "cuda" if device.type == "cuda" else "cpu"
    return accounting.training_memory_bytes(setting.model, setting.batch_size, setting.precision, kind)


def compare_curves(setting: Setting, device: torch.device, rivals: list[Entrant], keep: Keep) -> dict[str, Any]:
    """The loss curve of the setting and that of float32, eager, from the same weights on the same batches.

    How much that means is told by further curves in float32, on the same batches too, from other weights. Losses are
    means over 20 pieces of the run, so that one batch does not decide.
    """
    plain = dataclasses.replace(setting, precision="32-true", compile=False)
    means: dict[str, list[float]] = {}

    def add(name: str, curve: list[float]) -> None:
        means[name] = [statistics.fmean(piece) for piece in np.array_split(curve, min(20, setting.steps))]

    def largest_difference(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(means[one], means[other], strict=True))

    add("as set", loss_curve(setting, device, seed=0))
    result: dict[str, Any] = {"name": setting.name, "setting": asdict(setting), "means": means}
    seeds: list[str] = []
    for seed in range(setting.rounds):
        seeds.append(f"float32, seed {seed}")
        add(seeds[-1], loss_curve(plain, device, seed))
        result["largest_difference"] = largest_difference("as set", seeds[0])
        result["differences_of_seeds"] = [largest_difference(a, b) for a, b in itertools.combinations(seeds, 2)]
        keep(result)
    return result


def loss_curve(setting: Setting, device: torch.device, seed: int) -> list[float]:
    """The loss at each of `setting.steps` steps with a cosine schedule; the seed is that of the weights alone."""
    from lm.data import DeviceTokens, TokenFile

    length = setting.model.context_length
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), setting.model.vocab_size)
        tokens = DeviceTokens(TokenFile(Path(folder) / "train.npy"), device)
        trainer = BareLoop("ours", setting, Path(folder), device, seed)
    order = torch.Generator().manual_seed(0)
    losses = []
    for step in range(1, setting.steps + 1):
        starts = torch.randint(len(trainer.tokens) - length, (setting.batch_size,), generator=order)
        rate = cosine_schedule(step, ADAMW["lr"], 0.1 * ADAMW["lr"], setting.steps // 10, setting.steps)
        trainer.optimizer.param_groups[0]["lr"] = rate
        loss = trainer.forward(*tokens.get_batch(length, starts.to(device)))
        loss.backward()
        trainer.optimize()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare_generation(setting: Setting, device: torch.device, rivals: list[Entrant], keep: Keep) -> dict[str, Any]:
    """Tokens per second of sampling from random weights, one text at a time and a batch of 16, nothing compiled."""
    num_tokens, rounds = min(128, setting.model.context_length - 1), min(3, setting.rounds)
    generators = make_generators(setting, device, rivals, num_tokens)
    result: dict[str, Any] = {"name": setting.name, "setting": asdict(setting), "new_tokens": num_tokens, "results": {}}
    for batch_size in (1, 16):
        if batch_size > 1:
            del generators["builtin"]  # minutes
        seconds: dict[str, list[float]] = {name: [] for name in generators}
        for round_number in range(rounds + 1):
            for name, generate in generators.items():
                synchronize(device)
                began = time.perf_counter()
                generate(batch_size)
                synchronize(device)
                if round_number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
        result["results"][f"batch {batch_size}"] = {
            name: {
                "tokens_per_second": summary([batch_size * num_tokens / s for s in values]),
                "speed_relative_to_ours": summary([b / s for b, s in zip(seconds["ours"], values, strict=True)]),
            }
            for name, values in seconds.items()
        }
        keep(result)
    return result


# -------------------------------------------------------------------------------------------------------- the machine


def roofs(setting: Setting, device: torch.device) -> tuple[float, float]:
    """FLOP/s of one large matrix product, and bytes per second of one large copy, on the device as it is."""
    dtype = torch.float32 if setting.precision == "32-true" else torch.bfloat16
    if device.type == "cuda":
        return matmul_flops(device, dtype, 8192, repeats=20), memory_bandwidth(device, 2**30, repeats=20)
    # Many a CPU has no unit for bfloat16: what float32 does in seconds takes minutes.
    size = 2048 if dtype == torch.float32 else 256
    return matmul_flops(device, dtype, size, repeats=3), memory_bandwidth(device, 2**26, repeats=3)


def least_bytes(setting: Setting) -> int:
    """What a training step must move at least between memory and processor.

    What the forward pass keeps for the backward pass is written and read, with attention that keeps no scores; the
    weights are read in both; gradients are written once; the update reads weight, gradient and two moments, and writes
    all but the gradient.
    """
    model = dataclasses.replace(setting.model, attention="fused")
    kept = accounting.activations(model, setting.batch_size, setting.precision)
    width = 4 if setting.precision == "32-true" else 2
    return 2 * sum(part.num_bytes for part in kept) + accounting.num_parameters(model) * (2 * width + 4 + 28)


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the record."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lightning", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
