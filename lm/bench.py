"""How fast training and generation are, beside what one would write without this project, on any device.

All entrants of a training comparison take turns in one process, a few steps each, round after round, so that whatever
else the machine does falls on all of them; a ratio is the median over the rounds of the ratio within a round.

- ours: this project's model, loss, clipping, AdamW and batches in a bare loop;
- lightning: the same under the Trainer, as `python -m lm fit` runs it;
- builtin: the same architecture from `torch.nn`, with `torch.optim.AdamW(fused=True)`, in a bare loop;
- transformers: `LlamaForCausalLM` of the same shape, otherwise like builtin, where it is installed.

This is the one file where the libraries that the project does without are used: as rivals.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
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
from lm.generate import Sampling, pick_device, sample_tokens
from lm.model import TransformerConfig, TransformerLM
from lm.optim import AdamW, clip_gradients
from tokenizer.files import atomic_write

Entrant = Literal["ours", "lightning", "builtin", "transformers"]
MAX_NORM = 1.0
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Setting:
    """One comparison: a model, a batch and how it is computed.

    Attributes:
        name: in the results.
        model: the architecture of all entrants.
        batch_size: sequences of `model.context_length` tokens per step.
        precision: "32-true", or "bf16-mixed" (autocast).
        compile: torch.compile model and loss, for all entrants.
        steps: of each entrant per round.
        rounds: in which each entrant has its turn.
    """

    name: str
    model: TransformerConfig
    batch_size: int
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False
    steps: int = 5
    rounds: int = 7


BASE = accounting.named_config("tinystories")
DEMO = TransformerConfig(2048, context_length=256, num_layers=3, num_heads=4, d_model=128, d_ff=344, head="tied")
# 50,257 rounded up to a multiple of 128, as tensor cores like it
SMALL_GPT2 = dataclasses.replace(accounting.named_config("gpt2-small"), vocab_size=50_304)
SUITES: dict[str, list[Setting]] = {
    "cpu": [Setting("demo", DEMO, 8, steps=25, rounds=7), Setting("base", BASE, 8, steps=1, rounds=9)],
    "gpu": [
        Setting("base, bf16, compiled", BASE, 256, "bf16-mixed", compile=True, steps=50),
        Setting("12 x 768, context 1024, bf16, compiled", SMALL_GPT2, 32, "bf16-mixed", compile=True, steps=10),
        Setting("base, float32", BASE, 128, steps=20),
    ],
}


# ------------------------------------------------------------------------------------------------------- the rivals


class BuiltinBlock(nn.Module):
    """Pre-norm, RoPE, SwiGLU from torch's own layers; one matrix for q, k and v."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.ln1 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.output_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ln2 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention and feed-forward, each with its residual connection."""
        batch, seq, d_model = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(batch, seq, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output_proj(attended.transpose(1, 2).reshape(batch, seq, d_model))
        h = self.ln2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class BuiltinLM(nn.Module):
    """The same architecture as the default `TransformerLM`, as one would write it with `torch.nn`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(BuiltinBlock(config) for _ in range(config.num_layers))
        self.ln_final = nn.RMSNorm(config.d_model, eps=1e-5)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.head == "tied":
            self.lm_head.weight = self.embedding.weight
        frequencies = config.rope_theta ** (-torch.arange(0, config.d_head, 2) / config.d_head)
        angles = torch.arange(config.context_length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(token_ids)
        cos, sin = self.cos[: token_ids.shape[1]], self.sin[: token_ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.ln_final(x))

    @classmethod
    def from_ours(cls, ours: TransformerLM) -> "BuiltinLM":
        """The same function with the same weights."""
        model = cls(ours.config)
        weights = ours.state_dict()
        embedding = weights["token_embeddings.weight"]
        state = {
            "embedding.weight": embedding,
            "ln_final.weight": weights["ln_final.weight"],
            "lm_head.weight": weights.get("lm_head.weight", embedding),
        }
        for i in range(ours.config.num_layers):
            theirs, own = f"blocks.{i}", f"layers.{i}"
            qkv = [weights[f"{own}.attn.{name}_proj.weight"] for name in "qkv"]
            state[f"{theirs}.qkv.weight"] = torch.cat(qkv)
            state[f"{theirs}.output_proj.weight"] = weights[f"{own}.attn.output_proj.weight"]
            for name in ("w1", "w2", "w3"):
                state[f"{theirs}.{name}.weight"] = weights[f"{own}.ffn.{name}.weight"]
            for name in ("ln1", "ln2"):
                state[f"{theirs}.{name}.weight"] = weights[f"{own}.{name}.weight"]
        model.load_state_dict(state)
        return model


def make_llama(config: TransformerConfig) -> nn.Module:
    """`transformers`' Llama of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": config.head == "tied",
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


# ---------------------------------------------------------------------------------------------------- training steps


class Trainer:
    """One entrant's training: its step in parts, each of which can be timed alone."""

    def __init__(self, entrant: Entrant, setting: Setting, directory: Path, device: torch.device) -> None:
        from lm.data import DeviceTokens, TokenFile

        torch.manual_seed(0)
        self.setting, self.device = setting, device
        self.tokens = np.load(directory / "train.npy")
        self.ours = entrant == "ours"
        on_device = self.ours and device.type == "cuda"
        self.device_tokens = DeviceTokens(TokenFile(directory / "train.npy"), device) if on_device else None
        if self.ours:
            self.model: nn.Module = TransformerLM(setting.model, device)
            adamw = AdamW(self.model.parameters(), **ADAMW)
            adamw.compiled = setting.compile
            self.optimizer: torch.optim.Optimizer = adamw
        else:
            model = BuiltinLM(setting.model) if entrant == "builtin" else make_llama(setting.model)
            self.model = model.to(device)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)
        losses = {"ours": self._our_loss, "builtin": self._builtin_loss, "transformers": self._llama_loss}
        self.compute_loss = torch.compile(losses[entrant]) if setting.compile else losses[entrant]

    def _our_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets=targets)

    def _builtin_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    def _llama_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs, use_cache=False).logits.flatten(0, 1), targets.flatten())

    def data(self) -> tuple[Tensor, Tensor]:
        """A batch: ours from the device or with `get_batch`, as in a run of the project; a rival's as in nanoGPT."""
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
        return inputs.to(self.device), targets.to(self.device)

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

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes allocated on the device at any time during `step`, those from before it not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in changes), initial=0))


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


def installed_rivals() -> list[Entrant]:
    """The rivals that can run here."""
    return ["builtin", "transformers"] if importlib.util.find_spec("transformers") else ["builtin"]


def compare_training(setting: Setting, device: torch.device, rivals: list[Entrant], matmul: float) -> dict[str, Any]:
    """Tokens per second of all entrants in turns, their ratios, parts and memory.

    Args:
        setting: what is compared.
        device: where.
        rivals: beside "ours" and "lightning".
        matmul: what `matmul_flops` measured here.
    """
    seconds: dict[Entrant, list[float]] = {"ours": [], "lightning": [], **{name: [] for name in rivals}}
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        directory = Path(folder)
        write_dataset(directory, setting.model.vocab_size)
        entrants: dict[Entrant, Trainer] = {
            name: Trainer(name, setting, directory, device) for name in seconds if name != "lightning"
        }

        def round_of_bare_loops() -> None:
            for name, entrant in entrants.items():
                seconds[name].append(entrant.run(setting.steps))

        round_of_bare_loops()  # compiles, warms up
        for values in seconds.values():
            values.clear()
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
        static = 3 * sum(p.numel() * p.element_size() for p in entrant.model.parameters())
        results[name]["peak_memory_bytes"] = static + peak_memory(entrant.step, device)
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
        "roofline_tokens_per_second": matmul / flops_per_token,
        "predicted_memory_bytes": accounting.training_memory_bytes(
            setting.model, setting.batch_size, precision=setting.precision
        ),
        "lightning_overhead": summary(overhead),
        "entrants": results,
    }


def write_dataset(directory: Path, vocab_size: int) -> None:
    """A dataset directory of random tokens, for `TokenDataModule`."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, 2_000_000, dtype=np.uint16)
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


def compare_generation(setting: Setting, device: torch.device, rivals: list[Entrant], rounds: int) -> dict[str, Any]:
    """Tokens per second of sampling from random weights, one text at a time and a batch of 16.

    "builtin" is the usual loop around a model without a cache, each token from the whole text, and runs alone;
    "transformers" has a cache.
    """
    num_tokens = min(128, setting.model.context_length - 1)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16-mixed")
    torch.manual_seed(0)
    ours = TransformerLM(setting.model, device).eval()
    builtin = BuiltinLM.from_ours(ours.cpu()).to(device).eval()
    ours.to(device)

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
        llama: Any = make_llama(setting.model).to(device).eval()

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
                with autocast:
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


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of one large matrix product on the device as it is: the roof that a training step cannot break through."""
    size, repeats = (8192, 20) if device.type == "cuda" else (2048, 3)
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - began))
    return best


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


# --------------------------------------------------------------------------------------------------------- the pages


def markdown(result: dict[str, Any]) -> str:
    """The result as a section of a report."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"## Training and generation, {about['device']}", "", f"{about['threads']} threads, {versions}.", ""]
    for training in result["training"]:
        setting = training["setting"]
        compiled = ", compiled" if setting["compile"] else ""
        lines += [
            f"### Training: {training['name']}",
            "",
            f"{training['num_parameters']:,} parameters, {setting['batch_size']} x "
            f"{setting['model']['context_length']} tokens per step, {setting['precision']}{compiled}; "
            f"median of {setting['rounds']} rounds in turns (range). "
            f"Roofline: a large matrix product reaches {training['matmul_flops'] / 1e12:.2f} TFLOP/s here, "
            f"{training['roofline_tokens_per_second']:,.0f} tokens/s.",
            "",
            "| | tokens/s | relative to builtin | ms per step | MFU | share of the roofline | peak memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, entrant in training["entrants"].items():
            speed, ratio = entrant["tokens_per_second"], entrant["speed_relative_to_builtin"]
            mfu = f"{entrant['mfu']:.1%}" if entrant["mfu"] else "-"
            memory = f"{entrant['peak_memory_bytes'] / 2**20:,.0f} MiB" if "peak_memory_bytes" in entrant else "-"
            lines.append(
                f"| {name} | {speed['median']:,.0f} ({speed['low']:,.0f}-{speed['high']:,.0f}) "
                f"| {ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) "
                f"| {entrant['milliseconds_per_step']:,.1f} | {mfu} | {entrant['share_of_matmul']:.0%} | {memory} |"
            )
        overhead = training["lightning_overhead"]
        lines += [
            "",
            f"Lightning's loop, logging included, costs {overhead['median']:+.1%} over our bare loop "
            f"({overhead['low']:+.1%} to {overhead['high']:+.1%}). "
            f"Predicted peak memory: {training['predicted_memory_bytes'] / 2**20:,.0f} MiB.",
            "",
            "| milliseconds of one step | "
            + " | ".join(next(iter(training["entrants"].values()))["parts_seconds"])
            + " |",
            "|---|---|---|---|---|",
        ]
        for name, entrant in training["entrants"].items():
            if "parts_seconds" in entrant:
                parts = " | ".join(f"{1e3 * seconds:,.1f}" for seconds in entrant["parts_seconds"].values())
                lines.append(f"| {name} | {parts} |")
        lines.append("")
    for generation in result["generation"]:
        lines += [f"### Generation: {generation['name']}, {generation['new_tokens']} tokens", ""]
        lines += ["| | tokens/s | relative to ours |", "|---|---|---|"]
        for batch, entrants in generation["results"].items():
            for name, entrant in entrants.items():
                speed, ratio = entrant["tokens_per_second"], entrant["speed_relative_to_ours"]
                lines.append(
                    f"| {name}, {batch} | {speed['median']:,.0f} ({speed['low']:,.0f}-{speed['high']:,.0f}) "
                    f"| {ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) |"
                )
        lines.append("")
    lines += [f"Not measured: {lost['kind']} {lost['name']}: {lost['error']}" for lost in result.get("failures", [])]
    return "\n".join(lines)


def run(
    suite: Literal["auto", "cpu", "gpu"] = "auto",
    only: str | None = None,
    rivals: bool = True,
    rounds: int | None = None,
    json_path: Path | None = None,
    markdown_path: Path | None = None,
    device: str = "auto",
) -> None:
    """Measure training steps and generation beside what one would write without this project.

    A part that fails is named in the result and costs no other; the JSON file is written after each part.

    Args:
        suite: which settings; auto takes gpu where there is one. `--suite gpu` alone measures all GPU figures.
        only: the settings whose name contains this.
        rivals: also transformers' Llama, where installed, beside the loop of torch built-ins.
        rounds: turns of each entrant; default, each setting's own.
        json_path: write all figures here.
        markdown_path: write the tables here.
        device: cpu, cuda, mps, ...

    Raises:
        ValueError: no setting of that name, or the gpu suite without a GPU.
    """
    target = pick_device(device)
    suite = ("gpu" if target.type == "cuda" else "cpu") if suite == "auto" else suite
    if suite == "gpu" and target.type != "cuda":
        raise ValueError("suite=gpu needs a CUDA device, none is here: use --suite cpu")
    settings = [setting for setting in SUITES[suite] if only is None or only in setting.name]
    if not settings:
        raise ValueError(f"only={only!r} is in no name of: {', '.join(s.name for s in SUITES[suite])}")
    others: list[Entrant] = installed_rivals() if rivals else ["builtin"]
    result: dict[str, Any] = {"machine": machine(target), "suite": suite, "training": [], "generation": []}
    result["failures"] = []

    def train(setting: Setting) -> dict[str, Any]:
        return compare_training(setting, target, others, matmul_flops(target, setting.precision))

    def write(setting: Setting) -> dict[str, Any]:
        return compare_generation(setting, target, others, rounds=min(3, setting.rounds))

    settings = [dataclasses.replace(setting, rounds=rounds or setting.rounds) for setting in settings]
    measurements: dict[str, Callable[[Setting], dict[str, Any]]] = {"training": train, "generation": write}
    for kind, measure in measurements.items():  # the training of all settings first: it is asked for most
        for setting in settings:
            print(f"{kind}: {setting.name} ...", file=sys.stderr)
            try:
                result[kind].append(measure(setting))
            except Exception as error:  # a part that fails, for want of memory say, costs only itself
                traceback.print_exc()
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                result["failures"].append({"kind": kind, "name": setting.name, "error": message})
            if target.type == "cuda":
                torch.cuda.empty_cache()
            if json_path is not None:  # after each part, for whatever ends the process
                with atomic_write(json_path, "w") as file:
                    json.dump(result, file, indent=1)
    text = markdown(result)
    print(text)
    if markdown_path is not None:
        with atomic_write(markdown_path, "w") as file:
            file.write(text)
    if not (result["training"] or result["generation"]):
        raise ValueError("nothing could be measured: what went wrong stands above")
