"""The cost of a training step with each option, relative to the sweep's first run: what makes equal steps equal time.

    OMP_NUM_THREADS=1 python logs/leaderboard/step_cost.py [PAIRS [SWEEP]]

Steps of the baseline and of one option take turns, so that whatever else the machine does weighs on both; each step's
processor time is taken, and the median of the ratios of neighbours is printed.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lm.model import TransformerConfig, TransformerLM
from lm.module import OptimizerConfig
from lm.optim import clip_gradients
from lm.sweep import plan


def section(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The settings below a dotted prefix."""
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def make_steps(settings: dict[str, Any]) -> list[Callable[[], None]]:
    """A training step by a run's settings, on random tokens; one for each of its context lengths."""
    vocab_size, context_length = settings["data.vocab_size"], settings["data.context_length"]
    model = TransformerLM(TransformerConfig(vocab_size, context_length, **section(settings, "model.transformer.")))
    optimizer = OptimizerConfig(**section(settings, "model.optimizer.")).make(model)
    tokens = torch.randint(vocab_size, (settings["data.batch_size"], context_length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(length: int) -> None:
        optimizer.zero_grad()
        pieces = inputs.view(-1, length), targets.view(-1, length)
        model(pieces[0], targets=pieces[1]).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()

    lengths = settings.get("model.schedule.context_lengths", {0: context_length})
    return [partial(step, length) for length in lengths.values()]


def seconds(step: Callable[[], None]) -> float:
    """Processor time of one step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def main(pairs: str = "40", sweep: str = "configs/sweeps/leaderboard.yaml") -> None:
    """Print a line per run of the sweep's first seed."""
    torch.set_num_threads(1)
    runs = [run for run in plan(Path(sweep), "cpu") if run.name.endswith("seed_0")]
    settings = {run.name.removesuffix("-seed_0"): run.merged for run in runs}
    [base] = make_steps(next(iter(settings.values())))
    for name, own in settings.items():
        ratios = []
        for step in make_steps(own):
            both = [(seconds(step), seconds(base)) for _ in range(int(pairs) + 5)][5:]
            ratios.append(statistics.median(one / other for one, other in both))
        print(f"{name:<32}{statistics.fmean(ratios):.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
