"""Who takes part in `python -m lm bench`: this model and its rivals, in bare loops and under Lightning's.

Each takes the batches that it would take in earnest, of the same tokens.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.device import peak_memory, synchronize
from lm.generate import Sampling, sample_tokens
from lm.model import TransformerConfig, TransformerLM
from lm.optim import AdamW, clip_gradients
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


class BareLoop:
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

        That is from pinned memory, without waiting for the copy, and fetched while the device computes the step before;
        its windows are gathered with one index, as slice after slice takes milliseconds.
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
        block = torch.from_numpy(self.tokens[starts.numpy()[:, None] + np.arange(length + 1)].astype(np.int64))
        inputs, targets = block[:, :-1].contiguous(), block[:, 1:].contiguous()
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


def warmed_up(
    names: list[Entrant],
    setting: Setting,
    directory: Path,
    device: torch.device,
    keep: Callable[[Entrant, float], None],
) -> tuple[dict[Entrant, BareLoop], dict[Entrant, str]]:
    """The entrants after a first round, which compiles; and of those that failed in it, why.

    Ours and builtin must get through it, all else is compared with them.

    Args:
        names: of the entrants.
        setting: what they train.
        directory: the dataset.
        device: where.
        keep: called after each one's warming up with the seconds of one more round of its own.
    """
    entrants: dict[Entrant, BareLoop] = {}
    lost: dict[Entrant, str] = {}
    for name in names:
        try:
            entrant = BareLoop(name, setting, directory, device)
            entrant.run(setting.steps)
            entrants[name] = entrant
            keep(name, entrant.run(setting.steps))
        except Exception as error:
            if name in ("ours", "builtin"):
                raise
            lost[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return entrants, lost


# ------------------------------------------------------------------------------------------------------- Lightning


def fit_in_rounds(
    setting: Setting, directory: Path, device: torch.device, others: Callable[[float | None], None]
) -> None:
    """Train under Lightning's loop for `setting.rounds` rounds of `setting.steps` steps.

    After each of them, and after one more at the start that warms up, `others` gets the turn: called with the seconds
    of the round, of the one that warms up with None.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    from lm.callbacks import MetricsLog, Progress
    from lm.control import RunConfig, RunControl, Stopped
    from lm.data import TokenDataModule
    from lm.module import LanguageModel

    class Rounds(pl.Callback):
        """Keeps the time of the loop, all of it but what `others` takes."""

        began = 0.0

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            """After each round, give the turn to the others."""
            if trainer.global_step % setting.steps == 0:
                synchronize(device)
                others(time.perf_counter() - self.began if trainer.global_step > setting.steps else None)
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


# ------------------------------------------------------------------------------------------------------ generation


def make_generators(
    setting: Setting, device: torch.device, rivals: list[Entrant], num_tokens: int
) -> dict[str, Callable[[int], None]]:
    """What samples `num_tokens` tokens for as many texts as it is told, from the same random weights.

    They are in bfloat16 where the setting is: autocast would convert them anew for each token.
    "builtin" is the usual loop around a model without a cache, each token from the whole text; "transformers" has one.
    """
    dtype = torch.float32 if setting.precision == "32-true" else torch.bfloat16
    torch.manual_seed(0)
    ours = TransformerLM(setting.model).eval()
    builtin = BuiltinLM.from_ours(ours).to(device, dtype).eval()
    ours.to(device, dtype)

    def generate(batch_size: int) -> None:
        for _ in sample_tokens(ours, [0], Sampling(max_new_tokens=num_tokens), num_samples=batch_size):
            pass

    @torch.inference_mode()
    def generate_builtin(batch_size: int) -> None:
        text = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        for _ in range(num_tokens):
            probabilities = F.softmax(builtin(text)[:, -1].float(), dim=-1)
            text = torch.cat([text, torch.multinomial(probabilities, 1)], dim=1)

    generators: dict[str, Callable[[int], None]] = {"ours": generate, "builtin": generate_builtin}
    if "transformers" in rivals:
        llama: Any = make_llama(setting.model).to(device, dtype).eval()

        @torch.inference_mode()
        def generate_llama(batch_size: int) -> None:
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

        generators["transformers"] = generate_llama
    return generators


# ------------------------------------------------------------------------------------------------------------ tokens


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
