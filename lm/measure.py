"""What `python -m lm bench` measures: training, generation, memory, loss curves, and what the machine could do.

All entrants of a comparison take turns in one process, a few steps each, round after round, so that whatever else the
machine does falls on all of them; a ratio is the median over the rounds of the ratio within a round.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm import accounting
from lm.device import device_name, matmul_flops, memory_bandwidth, peak_memory, synchronize
from lm.generate import Sampling, sample_tokens
from lm.model import TransformerConfig, TransformerLM
from lm.optim import AdamW, clip_gradients, cosine_schedule
from lm.rivals import BuiltinLM, make_llama

Entrant = Literal["ours", "ours, library attention", "lightning", "builtin", "transformers"]
MAX_NORM = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Setting:
    """What is measured: a model, a batch and how it is computed.

    Attributes:
        name: in the results.
        model: the architecture of all entrants.
        batch_size: sequences of `model.context_length` tokens per step.
        precision: "32-true", or "bf16-mixed" (autocast).
        compile: torch.compile model and loss, for all entrants, in its default mode or the named one.
        steps: of each entrant per round; of a loss curve, all.
        rounds: in which each entrant has its turn; of a loss curve, seeds in float32.
    """

    name: str
    model: TransformerConfig
    batch_size: int
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool | Literal["reduce-overhead"] = False
    steps: int = 5
    rounds: int = 7


class Trainer:
    """One entrant's training: its step in parts, each of which can be timed alone."""

    def __init__(
        self, entrant: Entrant, setting: Setting, directory: Path, device: torch.device, seed: int = 0
    ) -> None:
        from lm.data import DeviceTokens, TokenFile
        from lm.module import compiled

        torch.manual_seed(seed)
        self.setting, self.device = setting, device
        self.tokens = np.load(directory / "train.npy")
        self.ours = entrant.startswith("ours")
        on_device = self.ours and device.type == "cuda"
        self.device_tokens = DeviceTokens(TokenFile(directory / "train.npy"), device) if on_device else None
        if self.ours:
            library = entrant == "ours, library attention"
            model_config = dataclasses.replace(setting.model, attention="fused") if library else setting.model
            self.model: nn.Module = TransformerLM(model_config, device)
            adamw = AdamW(self.model.parameters(), **ADAMW)
            adamw.compiled = bool(setting.compile)
            self.optimizer: torch.optim.Optimizer = adamw
        else:
            model = BuiltinLM(setting.model) if entrant == "builtin" else make_llama(setting.model)
            self.model = model.to(device)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)
        losses = {"builtin": self._builtin_loss, "transformers": self._llama_loss}
        loss: Callable[..., Tensor] = losses.get(entrant, self._our_loss)
        self.compute_loss = compiled(loss, setting.compile) if setting.compile else loss
        self.next_batch: tuple[Tensor, Tensor] | None = None

    def _our_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets=targets)

    def _builtin_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    def _llama_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())

    def data(self) -> tuple[Tensor, Tensor]:
        """A batch: ours from the device or with `get_batch`, as in a run of the project; a rival's as in nanoGPT.

        That is from pinned memory, without waiting for the copy, and fetched while the device computes the step before.
        """
        if self.next_batch is not None:
            batch, self.next_batch = self.next_batch, None
            return batch
        batch_size, length = self.setting.batch_size, self.setting.model.context_length
        if self.device_tokens is not None:
            starts = torch.randint(len(self.tokens) - length, (batch_size,), device=self.device)
            return self.device_tokens.get_batch(length, starts)
        if self.ours:
            from lm.data import get_batch

            return get_batch(self.tokens, batch_size, length, self.device)
        starts = torch.randint(len(self.tokens) - length, (batch_size,))
        inputs = torch.stack([torch.from_numpy(self.tokens[i : i + length].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(self.tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.precision == "bf16-mixed"):
            return self.compute_loss(inputs, targets)

    def optimize(self) -> None:
        """Clip and update."""
        if self.ours:
            clip_gradients(self.model.parameters(), MAX_NORM)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> Tensor:
        """One whole step; returns the loss without waiting for it."""
        loss = self.forward(*self.data())
        if not self.ours and self.device.type == "cuda":
            self.next_batch = self.data()
        loss.backward()
        self.optimize()
        return loss.detach()

    def run(self, steps: int) -> float:
        """Seconds that `steps` steps take."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        loss.item()  # waits for the device
        return time.perf_counter() - began

    def parts(self) -> dict[str, float]:
        """Seconds of each part of one step, the device idle in between."""
        self.next_batch = None
        marks = [self._now()]
        batch = self.data()
        marks.append(self._now())
        loss = self.forward(*batch)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimize()
        marks.append(self._now())
        names = ("data", "forward", "backward", "clip and optimizer")
        return {name: end - begin for name, (begin, end) in zip(names, itertools.pairwise(marks), strict=True)}

    def peak_memory(self) -> int:
        """The most bytes at any time of a step, with the weights and the optimizer's two numbers for each."""
        static = 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.step()  # what a library allocates once, and keeps, is not counted
        return static + peak_memory(self.step, self.device)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


# ------------------------------------------------------------------------------------------------------- Lightning


def fit_in_rounds(setting: Setting, directory: Path, device: torch.device, others: Callable[[], None]) -> list[float]:
    """Train under Lightning's loop for `setting.rounds` rounds; between them, call `others`.

    Returns the seconds of each round of `setting.steps` steps.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    from lm.callbacks import MetricsLog, Progress
    from lm.control import RunConfig, RunControl, Stopped
    from lm.data import TokenDataModule
    from lm.module import LanguageModel

    seconds: list[float] = []

    class Rounds(pl.Callback):
        """Keeps the time of the loop, all of it but what `others` takes."""

        began = 0.0

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            """After each round, and after one more at the start that warms up, give the turn to the others."""
            if trainer.global_step % setting.steps == 0:
                synchronize(device)
                if trainer.global_step > setting.steps:
                    seconds.append(time.perf_counter() - self.began)
                others()
                synchronize(device)
                self.began = time.perf_counter()

    control = RunControl(RunConfig(logs=str(directory), validate_every_n_steps=10**9, sample_tokens=0))
    metrics = MetricsLog(control)
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        precision=setting.precision,
        max_steps=(setting.rounds + 1) * setting.steps,
        max_epochs=-1,
        gradient_clip_val=MAX_NORM,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(directory, "bench"),
        enable_model_summary=False,
        callbacks=[Rounds(), metrics, Progress(control, metrics), control],
    )
    data = TokenDataModule(
        directory=str(directory),
        context_length=setting.model.context_length,
        batch_size=setting.batch_size,
        tokens_on="device" if device.type == "cuda" else "host",
    )
    try:
        trainer.fit(LanguageModel(setting.model, compile=setting.compile), datamodule=data)
    except Stopped as stop:  # by a signal, which the run's control has taken over
        raise SystemExit(stop.exit_code) from None
    finally:
        control.signals.restore()
    return seconds


# ------------------------------------------------------------------------------------------------------ comparisons


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def warmed_up(
    names: list[Entrant], setting: Setting, directory: Path, device: torch.device
) -> tuple[dict[Entrant, Trainer], dict[Entrant, str]]:
    """The entrants after a first round, which compiles; and of those that failed in it, why.

    Ours and builtin must get through it, all else is compared with them.
    """
    entrants: dict[Entrant, Trainer] = {}
    lost: dict[Entrant, str] = {}
    for name in names:
        try:
            entrant = Trainer(name, setting, directory, device)
            entrant.run(setting.steps)
            entrants[name] = entrant
        except Exception as error:
            if name in ("ours", "builtin"):
                raise
            lost[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return entrants, lost


def compare_training(setting: Setting, device: torch.device, rivals: list[Entrant]) -> dict[str, Any]:
    """Tokens per second of all entrants in turns, their ratios, parts and memory; beside the roofline.

    Args:
        setting: what is compared.
        device: where.
        rivals: beside "ours" and "lightning".
    """
    matmul, bandwidth = roofs(setting, device)
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        directory = Path(folder)
        write_dataset(directory, setting.model.vocab_size)
        entrants, lost = warmed_up(["ours", *rivals], setting, directory, device)
        seconds: dict[Entrant, list[float]] = {"ours": [], "lightning": [], **{name: [] for name in entrants}}

        def round_of_bare_loops() -> None:
            for name, entrant in entrants.items():
                seconds[name].append(entrant.run(setting.steps))

        seconds["lightning"] = fit_in_rounds(setting, directory, device, round_of_bare_loops)
    for name in entrants:  # the turn before Lightning's first round, which only warmed up, has no partner
        del seconds[name][0]

    tokens_per_step = setting.batch_size * setting.model.context_length
    tokens_per_round = tokens_per_step * setting.steps
    flops_per_token = accounting.flops_per_token(setting.model)
    dtype: accounting.Dtype = "bfloat16"
    if setting.precision == "32-true":
        dtype = "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    sheet = accounting.peak_flops(device_name(device), dtype)
    results: dict[Entrant, Any] = {}
    for name, values in seconds.items():
        speed = summary([tokens_per_round / s for s in values])
        results[name] = {
            "tokens_per_second": speed,
            "milliseconds_per_step": 1e3 * statistics.median(values) / setting.steps,
            "mfu": flops_per_token * speed["median"] / sheet if sheet else None,
            "share_of_matmul": flops_per_token * speed["median"] / matmul,
            "speed_relative_to_builtin": summary([b / s for b, s in zip(seconds["builtin"], values, strict=True)]),
        }
    for name, entrant in entrants.items():
        if setting.compile != "reduce-overhead":  # CUDA graphs hold their memory from one step to the next
            results[name]["peak_memory_bytes"] = entrant.peak_memory()
    turns = [{name: entrant.parts() for name, entrant in entrants.items()} for _ in range(setting.rounds)]
    for name in entrants:
        results[name]["parts_seconds"] = {
            part: statistics.median(turn[name][part] for turn in turns) for part in turns[0][name]
        }
    overhead = [f / s - 1 for f, s in zip(seconds["lightning"], seconds["ours"], strict=True)]
    return {
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
        "lightning_overhead": summary(overhead),
        "entrants": results,
        "lost": lost,
    }


def compare_memory(setting: Setting, device: torch.device, rivals: list[Entrant]) -> dict[str, Any]:
    """Peak memory of one eager step of ours beside what `lm.accounting` predicts, in several ways to compute it."""
    ways: dict[str, dict[str, Any]] = {
        "float32": {"precision": "32-true"},
        "bf16": {"precision": "bf16-mixed"},
        "bf16, library attention": {"precision": "bf16-mixed", "attention": "fused"},
        "bf16, activation checkpointing": {"precision": "bf16-mixed", "activation_checkpointing": True},
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), setting.model.vocab_size)
        for name, way in ways.items():
            precision = way.pop("precision")
            model = dataclasses.replace(setting.model, **way)
            one = dataclasses.replace(setting, model=model, precision=precision, compile=False)
            trainer = Trainer("ours", one, Path(folder), device)
            trainer.step()  # the optimizer's numbers are there from now on
            predicted, measured = predicted_memory(one, device), trainer.peak_memory()
            results[name] = {"predicted_bytes": predicted, "measured_bytes": measured}
            del trainer
    return {"name": setting.name, "setting": asdict(setting), "results": results}


def predicted_memory(setting: Setting, device: torch.device) -> int:
    """By `lm.accounting`, for an eager step."""
    kind: accounting.DeviceType = "cuda" if device.type == "cuda" else "cpu"
    return accounting.training_memory_bytes(
        setting.model, setting.batch_size, precision=setting.precision, device_type=kind
    )


def compare_curves(setting: Setting, device: torch.device, rivals: list[Entrant]) -> dict[str, Any]:
    """The loss curve of the setting and that of float32, eager, from the same weights on the same batches.

    How much that means is told by further curves in float32, on the same batches too, from other weights. Losses are
    means over 20 pieces of the run, so that one batch does not decide.
    """
    plain = dataclasses.replace(setting, precision="32-true", compile=False)
    curves = {"as set": loss_curve(setting, device, seed=0)}
    curves |= {f"float32, seed {seed}": loss_curve(plain, device, seed) for seed in range(setting.rounds)}
    pieces = min(20, setting.steps)
    means = {name: [statistics.fmean(piece) for piece in np.array_split(c, pieces)] for name, c in curves.items()}

    def largest_difference(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(means[one], means[other], strict=True))

    seeds = [name for name in curves if name != "as set"]
    return {
        "name": setting.name,
        "setting": asdict(setting),
        "means": means,
        "largest_difference": largest_difference("as set", "float32, seed 0"),
        "differences_of_seeds": [largest_difference(a, b) for a, b in itertools.combinations(seeds, 2)],
    }


def loss_curve(setting: Setting, device: torch.device, seed: int) -> list[float]:
    """The loss at each of `setting.steps` steps with a cosine schedule; the seed is that of the weights alone."""
    from lm.data import DeviceTokens, TokenFile

    length = setting.model.context_length
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), setting.model.vocab_size)
        tokens = DeviceTokens(TokenFile(Path(folder) / "train.npy"), device)
        trainer = Trainer("ours", setting, Path(folder), device, seed)
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


@functools.cache
def chain(num_tokens: int, vocab_size: int) -> np.ndarray:
    """Tokens of a Markov chain in which eight may follow each, the first half of the time, the next a quarter, ...

    The least loss that a model can have is 1.38 nats (2 (1 - 2^-7) ln 2).
    """
    random = np.random.default_rng(0)
    followers = random.integers(0, vocab_size, (vocab_size, 8))
    walks = 1000  # side by side, then one after the other
    tokens = np.empty((walks, -(-num_tokens // walks)), np.uint16)
    tokens[:, 0] = random.integers(0, vocab_size, walks)
    for i in range(1, tokens.shape[1]):
        choices = np.minimum(random.geometric(0.5, walks), 8) - 1
        tokens[:, i] = followers[tokens[:, i - 1], choices]
    return tokens.reshape(-1)[:num_tokens]


def write_dataset(directory: Path, vocab_size: int) -> None:
    """A dataset directory for `TokenDataModule`."""
    tokens = chain(2_000_000, vocab_size)
    splits = {}
    for split in ("train", "valid"):
        np.save(directory / f"{split}.npy", tokens)
        splits[split] = {
            "file": f"{split}.npy",
            "num_tokens": len(tokens),
            "num_bytes": 2 * len(tokens),
            "num_documents": 1,
            "text_sha256": "",
            "dtype": "uint16",
            "max_id": int(tokens.max()),
        }
    meta = {"format": 1, "vocab_size": vocab_size, "tokenizer_sha256": "", "special_tokens": [], "splits": splits}
    (directory / "meta.json").write_text(json.dumps(meta))


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's notices about what a benchmark leaves out on purpose."""
    import logging

    import lightning.pytorch  # noqa: F401 - it sets the level that is changed here

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def compare_generation(setting: Setting, device: torch.device, rivals: list[Entrant]) -> dict[str, Any]:
    """Tokens per second of sampling from random weights, one text at a time and a batch of 16, nothing compiled.

    The weights are in bfloat16 where the setting is: autocast would convert them anew for each token.
    "builtin" is the usual loop around a model without a cache, each token from the whole text, and runs alone;
    "transformers" has a cache.
    """
    num_tokens, rounds = min(128, setting.model.context_length - 1), min(3, setting.rounds)
    dtype = torch.float32 if setting.precision == "32-true" else torch.bfloat16
    torch.manual_seed(0)
    ours = TransformerLM(setting.model).eval()
    builtin = BuiltinLM.from_ours(ours).to(device, dtype).eval()
    ours.to(device, dtype)

    def run_ours(batch_size: int) -> None:
        for _ in sample_tokens(ours, [0], Sampling(max_new_tokens=num_tokens), num_samples=batch_size):
            pass

    @torch.inference_mode()
    def run_builtin(batch_size: int) -> None:
        text = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        for _ in range(num_tokens):
            probabilities = F.softmax(builtin(text)[:, -1].float(), dim=-1)
            text = torch.cat([text, torch.multinomial(probabilities, 1)], dim=1)

    runs: dict[str, Callable[[int], None]] = {"ours": run_ours, "builtin": run_builtin}
    if "transformers" in rivals:
        llama: Any = make_llama(setting.model).to(device, dtype).eval()

        @torch.inference_mode()
        def run_llama(batch_size: int) -> None:
            prompt = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
            llama.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
            )

        runs["transformers"] = run_llama

    results: dict[str, Any] = {}
    for batch_size in (1, 16):
        if batch_size > 1:
            del runs["builtin"]  # minutes
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round_number in range(rounds + 1):
            for name, run_entrant in runs.items():
                synchronize(device)
                began = time.perf_counter()
                run_entrant(batch_size)
                synchronize(device)
                if round_number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
        results[f"batch {batch_size}"] = {
            name: {
                "tokens_per_second": summary([batch_size * num_tokens / s for s in values]),
                "speed_relative_to_ours": summary([b / s for b, s in zip(seconds["ours"], values, strict=True)]),
            }
            for name, values in seconds.items()
        }
    return {"name": setting.name, "new_tokens": num_tokens, "results": results}


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
    kept = accounting.activations(model, setting.batch_size, precision=setting.precision)
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
