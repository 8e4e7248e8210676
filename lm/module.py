"""The training recipe: model, loss, optimizer and learning rate, as Lightning asks for them.

The loops, devices and precisions are Lightning's; every formula is this project's own (`functional`, `optim`).
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from lm.checkpoint import CheckpointError, load_model, peek
from lm.functional import cross_entropy
from lm.model import NO_MORE, SAME_WEIGHTS, TransformerConfig, TransformerLM
from lm.optim import AdamW, Muon, clip_gradients, cosine_schedule, trapezoid_schedule

Batch = Sequence[Any]  # inputs, targets, and in validation how many of the targets count
CompileMode = Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's settings (lm/optim.py). The norm that gradients are clipped to is `trainer.gradient_clip_val`
    (0: they are not).

    Attributes:
        lr: the highest learning rate; the schedule does the rest, also to those of the parts, below.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        matrices: what moves the blocks' matrices: AdamW like all the rest, or Muon.
        momentum: of Muon.
        matrix_lr: the highest rate of the blocks' matrices; default, lr.
        embedding_lr: that of the token embeddings, and of value embeddings; default, lr.
        head_lr: that of an untied head; default, lr.
        scalar_lr: that of gains and gates; default, lr.

    Raises:
        ValueError: a setting is out of its range.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    matrices: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95
    matrix_lr: float | None = None
    embedding_lr: float | None = None
    head_lr: float | None = None
    scalar_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "matrix_lr", "embedding_lr", "head_lr", "scalar_lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be in [0, 1)")
        for name in ("eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def options(self) -> dict[str, Any]:
        """What all parameters have in common: the options of the optimizer's one group."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def make(self, model: TransformerLM) -> AdamW:
        """The optimizer of all parameters of a model.

        Raises:
            ValueError: `head_lr` where the head is the token embeddings, or Muon under FSDP.
        """
        if self.head_lr is not None and model.config.head == "tied":
            raise ValueError(f"head_lr={self.head_lr}, but head=tied has no head of its own: use embedding_lr")
        parts = {name: part_of(name) for name, _ in model.named_parameters()}
        rates: dict[Tensor, float] = {
            parameter: getattr(self, f"{parts[name]}_lr") / self.lr
            for name, parameter in model.named_parameters()
            if getattr(self, f"{parts[name]}_lr") is not None
        }
        if self.matrices == "adamw":
            return AdamW(model.parameters(), **self.options, rates=rates)
        matrices = [parameter for name, parameter in model.named_parameters() if parts[name] == "matrix"]
        return Muon(model.parameters(), matrices, self.momentum, **self.options, rates=rates)


def part_of(name: str) -> Literal["matrix", "embedding", "head", "scalar"]:
    """What kind of parameter a name stands for.

    >>> [part_of(n) for n in ("layers.0.ffn.w1.weight", "token_embeddings.weight", "layers.0.ln1.weight")]
    ['matrix', 'embedding', 'scalar']
    """
    if name.startswith("lm_head"):
        return "head"
    if "embeddings" in name:
        return "embedding"
    return "matrix" if re.search(r"_proj\.weight$|ffn\.w\d\.weight$", name) else "scalar"


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the run.

    Attributes:
        shape: half a cosine down to the minimum, or constant and then linearly down (trapezoid).
        warmup_steps: updates until the highest rate is reached.
        min_lr_ratio: the last rate as a share of the highest.
        decay_ratio: trapezoid only: the share of the run in which the rate falls.
        follow: the run's length is `trainer.max_steps`, or what the clock allows (`run.max_minutes`).
        context_lengths: tokens per training sequence from these percentages of the run on, {0: 128, 30: 256}: windows
            are cut into pieces of that length, so that the tokens of an update stay the same.

    Raises:
        ValueError: a setting is out of its range.
    """

    shape: Literal["cosine", "trapezoid"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.3
    follow: Literal["steps", "clock"] = "steps"
    context_lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")
        for name in ("min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for percent, length in self.context_lengths.items():
            if not (0 <= percent < 100 and length > 0):
                raise ValueError(
                    f"context_lengths={self.context_lengths} must give lengths for percentages in [0, 100)"
                )

    def context_length(self, progress: float) -> int | None:
        """Tokens per piece of a window at this share of the run; None for whole windows."""
        lengths = [length for percent, length in sorted(self.context_lengths.items()) if percent <= 100 * progress]
        return lengths[-1] if lengths else None

    def rate(self, step: int, num_steps: float, max_lr: float) -> float:
        """The learning rate of update `step`, counted from 1, of a run of `num_steps`: the last one has the minimum."""
        min_lr = self.min_lr_ratio * max_lr
        if self.shape == "cosine":
            return cosine_schedule(float(step), max_lr, min_lr, float(self.warmup_steps), num_steps)
        decay_steps = self.decay_ratio * num_steps
        return trapezoid_schedule(float(step), max_lr, min_lr, float(self.warmup_steps), decay_steps, num_steps)


class LearningRate:
    """Sets the rate of an optimizer's groups; what Lightning steps and saves as the scheduler.

    Only the number of updates is saved: a resumed run follows the schedule it is given now.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> None:
        self.optimizer = optimizer
        self.rate = rate
        self.num_updates = 0
        self.apply()

    def apply(self) -> None:
        """Set the rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.num_updates + 1)

    def step(self) -> None:
        """Count one update and set the rate of the next."""
        self.num_updates += 1
        self.apply()

    def state_dict(self) -> dict[str, int]:
        """The number of updates done."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the saved number of updates, at the rate that the schedule now gives."""
        self.num_updates = state["num_updates"]
        self.apply()


class TokenLoss(Metric):
    """Mean loss in nats per token over everything seen, on all ranks; sums in float64."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, num_tokens: int) -> None:
        """Take in a mean `loss` over `num_tokens`."""
        self.nats += loss.to(self.nats) * num_tokens
        self.tokens += num_tokens

    def compute(self) -> Tensor:
        """Nats per token."""
        return self.nats / self.tokens


class LanguageModel(LightningModule):
    """A `TransformerLM` with its training and validation.

    The data's vocabulary and context length are said once, in the data section, and override those of `transformer`.

    Attributes:
        model: the network, there once Lightning has called `configure_model`.
        step_loss: mean loss of the micro-batches of the running update, nats per token, on this rank.
        grad_norm: norm of all gradients before clipping at the last update.
        nonfinite: True on the device once a loss or gradient norm was NaN or infinite.
        clock_progress: share of the time for training that has gone by, kept by `RunControl`; None without a cap.
    """

    model: TransformerLM
    step_loss: Tensor
    grad_norm: Tensor
    nonfinite: Tensor

    def __init__(
        self,
        transformer: TransformerConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        compile: bool | CompileMode | None = None,
        init_from: str | None = None,
    ) -> None:
        """Set the recipe; the weights come with `configure_model`.

        Args:
            transformer: sizes and variants of the network.
            optimizer: its settings.
            schedule: the learning rate over the run.
            compile: torch.compile the forward pass and the loss, and on CUDA the update; default, on CUDA alone.
                Checkpoints are the same either way. A mode of torch.compile's may be named: reduce-overhead replays
                CUDA graphs, max-autotune tries out many kernels for minutes.
            init_from: begin with the weights of this checkpoint, a file or a run's folder, and otherwise anew: updates
                and the schedule count from 0, the data may be others, encoded with the same tokenizer.
        """
        super().__init__()
        self.transformer = transformer
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.compile_loss = compile
        self.init_from = init_from
        self.loss: Callable[..., Tensor] = self.compute_loss
        self.clock_progress: float | None = None
        self.validation_result: dict[str, float] = {}
        for length in schedule.context_lengths.values():
            if transformer.context_length % length:
                raise ValueError(
                    f"context_lengths={schedule.context_lengths}: {length} must divide "
                    f"context_length={transformer.context_length}"
                )

    # ---------------------------------------------------------------------------------------------------- network

    def setup(self, stage: str) -> None:
        """Take the vocabulary that the data really has: a short text may not fill the one asked for.

        That of a model from elsewhere may be padded: then it stays as large as it is.
        """
        meta = self._data_meta()
        if meta:
            vocab_size = meta["vocab_size"]
            if source := self.trainer.ckpt_path or self.init_from:
                with contextlib.suppress(OSError, CheckpointError):  # which is said when it is loaded
                    vocab_size = max(vocab_size, peek(source)[0].vocab_size)
            self.transformer = replace(self.transformer, vocab_size=vocab_size)

    def _data_meta(self) -> dict[str, Any]:
        """meta.json of the run's dataset; empty where the Trainer got loaders instead."""
        return getattr(getattr(self.trainer, "datamodule", None), "meta", {})

    def configure_model(self) -> None:
        """Build the network on the device, the same for the same seed; shard it where the strategy does so."""
        if hasattr(self, "compile_update"):
            return  # a second stage of the same trainer
        if not hasattr(self, "model"):  # that of a checkpoint
            reset_seed()  # whatever preparing the data has drawn from the generators
            self.model = TransformerLM(self.transformer)
            if self.init_from and self.trainer.ckpt_path is None:
                self._begin_with(self.init_from)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])
        compile_loss = self.compile_loss
        if compile_loss is None:
            compile_loss = self.device.type == "cuda" and self.device_mesh is None
        if compile_loss:
            self.loss = compiled(self.compute_loss, compile_loss)
        self.compile_update = bool(compile_loss)
        self._reset_step()

    def _begin_with(self, path: str) -> None:
        source, info = load_model(path, self.model.token_embeddings.weight.device)
        trained, here = info["data"].get("tokenizer_sha256"), self._data_meta().get("tokenizer_sha256")
        if trained and here and trained != here:
            raise ValueError(f"init_from={path} has another tokenizer than the data: its ids mean other tokens")
        changed = differences(asdict(source.config), asdict(self.transformer), {*SAME_WEIGHTS, "context_length"})
        if changed:
            raise ValueError(f"init_from={path} is of another model: {'; '.join(changed)}")
        self.model.load_state_dict(source.state_dict())

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of the token after each position."""
        return self.model(token_ids)

    def compute_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token."""
        return self.model(inputs, targets=targets)

    # --------------------------------------------------------------------------------------------------- training

    def _reset_step(self) -> None:
        self.step_loss = torch.zeros((), device=self.device, dtype=torch.float32)
        self.grad_norm = torch.zeros((), device=self.device)
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=self.device)

    def on_train_start(self) -> None:
        """Let the settings of this command win over those that a checkpoint's optimizer state brought back."""
        self._reset_step()
        scheduler: Any = self.lr_schedulers()
        for group in scheduler.optimizer.param_groups:
            group.update(self.optimizer_config.options)
        scheduler.apply()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A new update begins with its first micro-batch."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_loss = torch.zeros_like(self.step_loss)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        inputs, targets = batch
        done = self.trainer.global_step
        if length := self.schedule.context_length(done / self.num_steps(done)):
            inputs, targets = inputs.view(-1, length), targets.view(-1, length)
        loss = self.loss(inputs, targets)
        self.step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients together; keep it, on the device, for the log and the check for NaN.

        A scaler of float16 gradients raises its scale until they overflow, and leaves that update out: no divergence.
        """
        norm = clip_gradients(self.model.parameters(), gradient_clip_val or math.inf)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self.nonfinite |= ~torch.isfinite(self.step_loss if scaled else self.grad_norm + self.step_loss)

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters in one group, and the learning rate, stepped once per update."""
        optimizer = self.optimizer_config.make(self.model)
        optimizer.compiled = self.compile_update
        scheduler = LearningRate(optimizer, self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's call once per update."""
        scheduler.step()

    def num_steps(self, step: int) -> float:
        """Updates in the whole run. By the clock, that is estimated anew at each step; `step` of them are done."""
        num_steps = float(self.trainer.max_steps) if self.trainer.max_steps > 0 else math.inf
        if self.schedule.follow == "clock" and self.clock_progress and step:
            num_steps = min(num_steps, step / self.clock_progress)
        return num_steps

    def learning_rate(self, step: int) -> float:
        """The rate of update `step`, counted from 1."""
        return self.schedule.rate(step, self.num_steps(step), self.optimizer_config.lr)

    # ------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Sums anew; made here and not in `__init__`, so that no precision plugin turns them into bfloat16."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        self.validation_loss = TokenLoss().to(device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of which the first `num_targets` targets count; the rest fills it up to its shape."""
        inputs, targets, num_targets = batch
        if num_targets == targets.numel():
            self.validation_loss.update(self.loss(inputs, targets), num_targets)
            return
        logits = self.model(inputs).flatten(0, -2)[:num_targets]  # all ranks call the model, whatever their share
        if num_targets:
            self.validation_loss.update(cross_entropy(logits, targets.flatten()[:num_targets]), num_targets)

    def on_validation_epoch_end(self) -> None:
        """The figures over the whole set and all ranks, in `validation_result` and Lightning's callback metrics."""
        loss = self.validation_loss.compute().item()
        self.validation_result = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        split = self._data_meta().get("splits", {}).get("valid", {})
        if split:
            bits = loss / math.log(2) * split["num_tokens"] / split["num_bytes"]
            self.validation_result["val/bits_per_byte"] = bits
        if "entropy_bits_per_byte" in split:
            self.validation_result["val/entropy_bits_per_byte"] = split["entropy_bits_per_byte"]
        # Not to the logger: it would count steps from 0 and add a series of epochs.
        self.log_dict(self.validation_result, logger=False, sync_dist=True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **settings: Any
    ) -> "LanguageModel":
        """The module of a checkpoint, with its weights: to look at, to generate with, or to train from.

        Args:
            checkpoint_path: a checkpoint file, or a run's folder for its best one.
            map_location: the device that the weights go to.
            settings: of the recipe, which a checkpoint does not have: `optimizer`, `schedule`, `compile`.

        Raises:
            FileNotFoundError: no such file, or no good checkpoint in the folder.
            CheckpointError: damaged, or not a checkpoint of this project.
        """
        model, _ = load_model(checkpoint_path, map_location)
        module = cls(model.config, **settings)
        module.model = model.train()
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model's configuration as plain values: equal shapes do not make equal models (norm pre, post)."""
        checkpoint["transformer"] = asdict(self.transformer)
        checkpoint["matrices"] = self.optimizer_config.matrices

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model and, to go on training, the state of another optimizer.

        A setting that the checkpoint does not name is one that came later: it had its default.

        Raises:
            ValueError: the checkpoint differs (and in what), or it is not one of this project.
        """
        if "transformer" not in checkpoint:
            raise ValueError("the checkpoint has no model configuration: it was not written by `python -m lm fit`")
        saved, current = asdict(TransformerConfig.from_saved(checkpoint["transformer"])), asdict(self.transformer)
        if self.trainer.training:
            saved["matrices"], current["matrices"] = checkpoint.get("matrices", "adamw"), self.optimizer_config.matrices
        if changed := differences(saved, current, SAME_WEIGHTS):
            raise ValueError("the checkpoint is of another model: " + "; ".join(changed))
        if "averaged" in checkpoint:
            raise ValueError(f"the checkpoint is of a run that averaged its weights, {NO_MORE}")


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], ignored: Collection[str]) -> list[str]:
    """In what a checkpoint's settings are others than the current ones, in words.

    >>> differences({"norm": "pre", "head": "tied"}, {"norm": "post", "head": "untied"}, ["head"])
    ['norm: checkpoint pre, now post']
    """
    return [
        f"{name}: checkpoint {saved[name]}, now {current[name]}"
        for name in current
        if name not in ignored and saved[name] != current[name]
    ]


def compiled(function: Callable[..., Tensor], mode: bool | CompileMode) -> Callable[..., Tensor]:
    """`function` by torch.compile, in its default mode or the named one, anew for each shape that it meets.

    Left to itself, torch would compile the second shape for any batch: training, after a validation of another size.
    With CUDA graphs each call begins a new replay, in the memory of the one before: the result is copied out, and
    gradients must be used up by then. So an update has one batch (`accumulate_grad_batches` 1).
    """
    replayed = torch.compile(function, mode=mode if isinstance(mode, str) else None, dynamic=False)
    if not uses_cuda_graphs(mode):
        return replayed

    def replay(*args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return replayed(*args).clone()

    return replay


def uses_cuda_graphs(mode: Any) -> bool:
    """Whether this mode of torch.compile's records CUDA graphs."""
    return mode in ("reduce-overhead", "max-autotune")


def shard(model: TransformerLM, mesh: Any) -> None:
    """FSDP2: each rank keeps its share of every block's parameters and gathers a block when it is used.

    Args:
        model: changed in place.
        mesh: the data-parallel dimension of the strategy's device mesh.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
