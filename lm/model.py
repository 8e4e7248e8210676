"""The Transformer language model and its configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList
from torch.utils.checkpoint import checkpoint

from lm.functional import linear_cross_entropy
from lm.layers import (
    Embedding,
    LayerCache,
    Linear,
    MultiHeadSelfAttention,
    RMSNorm,
    RotaryPositionalEmbedding,
    SiLUFeedForward,
    SquaredReLUFeedForward,
    SwiGLU,
)

Norm = Literal["pre", "post", "none"]
Position = Literal["rope", "none"]
FeedForward = Literal["swiglu", "silu", "relu2"]
Head = Literal["untied", "tied"]
Attention = Literal["scratch", "fused"]
Init = Literal["standard", "zero_output"]

NO_MORE = "a setting that is no more: logs/leaderboard/NOTES.md says why"
# Settings of earlier versions, with the value that leaves the model as it is without them.
REMOVED = {"logit_softcap": None, "unet_skips": False}
# How the model is computed, or was begun: with other values trained weights mean the same.
SAME_WEIGHTS = frozenset({"attention", "activation_checkpointing", "init"})

FEED_FORWARD: dict[str, type[SwiGLU | SiLUFeedForward]] = {
    "swiglu": SwiGLU,
    "silu": SiLUFeedForward,
    "relu2": SquaredReLUFeedForward,
}


@dataclass(frozen=True)
class TransformerConfig:
    """What a `TransformerLM` is; the defaults are the handout's base model.

    Attributes:
        vocab_size: token ids are in [0, vocab_size).
        context_length: the most positions that the model sees at once.
        num_layers: Transformer blocks.
        num_heads: attention heads per block, a divisor of `d_model`.
        d_model: the length of the residual stream's vectors.
        d_ff: the inner length of the feed-forward layer: about 8/3 d_model for swiglu, 4 d_model for the others.
        rope_theta: the base of RoPE's angles.
        norm: RMSNorm before each sub-layer, after each residual sum, or nowhere.
        position: RoPE, or no positional information.
        ffn: the gated feed-forward layer, or a plain one with SiLU or ReLU squared.
        head: output weights of their own, or the token embeddings'.
        attention: this project's attention, or torch's library kernel.
        activation_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        init: the handout's, or the same with zeros in the last matrix of each sub-layer and in an untied head, so that
            each sub-layer begins by adding nothing and all tokens are equally likely.
        qk_norm: RMSNorm on the queries and keys of each head.
        gated_attention: each head's output times 2 sigmoid(W x), 1 at first.
        value_embeddings: every other layer, the last among them, adds a learned vector of the token, 0 at first, to the
            attention's values (Zhou et al. 2024, "Value residual learning"; the modded-nanogpt records).

    Raises:
        ValueError: a size is not positive, a variant is unknown, `num_heads` does not divide `d_model`, or RoPE gets
            heads of odd length.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 4
    num_heads: int = 16
    d_model: int = 512
    d_ff: int = 1344
    rope_theta: float = 10_000.0
    norm: Norm = "pre"
    position: Position = "rope"
    ffn: FeedForward = "swiglu"
    head: Head = "untied"
    attention: Attention = "scratch"
    activation_checkpointing: bool = False
    init: Init = "standard"
    qk_norm: bool = False
    gated_attention: bool = False
    value_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name, choices in (
            ("norm", Norm),
            ("position", Position),
            ("ffn", FeedForward),
            ("head", Head),
            ("attention", Attention),
            ("init", Init),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(choices))}")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide d_model={self.d_model}")
        if self.position == "rope" and self.d_head % 2:
            raise ValueError(
                f"d_model={self.d_model} over num_heads={self.num_heads} gives heads of odd length {self.d_head}: "
                "RoPE rotates pairs"
            )

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "TransformerConfig":
        """The configuration that a checkpoint names: a setting that came later has its default.

        Raises:
            ValueError: it uses a setting that is no more, or has one that this version does not know.
        """
        known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
        for name in sorted(saved.keys() - known.keys()):
            if name not in REMOVED:
                raise ValueError(f"{name}={saved[name]} is a setting that this version does not know")
            if saved[name] != REMOVED[name]:
                raise ValueError(f"{name}={saved[name]} is {NO_MORE}")
        return cls(**known)

    @property
    def d_head(self) -> int:
        """The length of one head's queries, keys and values."""
        return self.d_model // self.num_heads

    @property
    def layers_with_value_embeddings(self) -> list[int]:
        """Every other layer, counted back from the last."""
        return [i for i in range(self.num_layers) if self.value_embeddings and (self.num_layers - 1 - i) % 2 == 0]


class TransformerBlock(Module):
    """Attention, then the feed-forward layer, each with a residual connection (CS336 A1 section 3.4, equation 15).

    Args:
        config: sizes and variants.
        rope: shared by all blocks; None for no positional information.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rope: RotaryPositionalEmbedding | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = config.norm
        self.attn = MultiHeadSelfAttention(
            config.d_model,
            config.num_heads,
            rope,
            device,
            dtype,
            attention=config.attention,
            qk_norm=config.qk_norm,
            gated=config.gated_attention,
        )
        self.ffn = FEED_FORWARD[config.ffn](config.d_model, config.d_ff, device, dtype)
        if config.init == "zero_output":
            self.attn.output_proj.weight.data.zero_()
            self.ffn.w2.weight.data.zero_()
        if config.norm != "none":
            self.ln1 = RMSNorm(config.d_model, device=device, dtype=dtype)
            self.ln2 = RMSNorm(config.d_model, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "*batch seq d_model"],
        token_positions: Int[Tensor, "*#batch seq"] | None = None,
        cache: LayerCache | None = None,
        values: Float[Tensor, "*batch seq d_model"] | None = None,
    ) -> Float[Tensor, "*batch seq d_model"]:
        """Add what the two sub-layers find; arguments as of `MultiHeadSelfAttention.forward`."""
        if self.norm == "pre":
            x = x + self.attn(self.ln1(x), token_positions, cache, values)
            return x + self.ffn(self.ln2(x))
        if self.norm == "post":
            x = self.ln1(x + self.attn(x, token_positions, cache, values))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(x, token_positions, cache, values)
        return x + self.ffn(x)


class KVCache:
    """What the attention layers keep of the positions seen so far; `TransformerLM.make_cache` makes one."""

    def __init__(self, layers: list[LayerCache], max_length: int) -> None:
        self.layers = layers
        self.max_length = max_length

    @property
    def length(self) -> int:
        """The number of positions held; set it lower to forget the last ones, 0 to start again."""
        return self.layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    def rows(self, which: slice) -> "KVCache":
        """An empty cache for some of the sequences, in the same memory."""
        return KVCache([layer.rows(which) for layer in self.layers], self.max_length)


class TransformerLM(Module):
    """Token ids to logits over the next token: embeddings, blocks, final norm, head (CS336 A1 section 3).

    The state dict has the names of the course's reference. A tied head has no entry of its own, and its embeddings
    start with standard deviation 1 / sqrt(d_model) instead of 1: at 1 the first logits would have standard deviation
    sqrt(d_model).
    """

    def __init__(
        self,
        config: TransformerConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.value_layers = config.layers_with_value_embeddings
        rope = None
        if config.position == "rope":
            rope = RotaryPositionalEmbedding(config.rope_theta, config.d_head, config.context_length, device)
        std = 1 / math.sqrt(config.d_model) if config.head == "tied" else 1.0
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, device, dtype, std=std)
        self.layers = ModuleList(TransformerBlock(config, rope, device, dtype) for _ in range(config.num_layers))
        if config.norm != "none":
            self.ln_final = RMSNorm(config.d_model, device=device, dtype=dtype)
        if config.head == "untied":
            self.lm_head = Linear(config.d_model, config.vocab_size, device, dtype)
            if config.init == "zero_output":
                self.lm_head.weight.data.zero_()
        if config.value_embeddings:
            tables = {str(i): Embedding(config.vocab_size, config.d_model, device, dtype) for i in self.value_layers}
            for table in tables.values():
                table.weight.data.zero_()
            self.value_embeddings = ModuleDict(tables)

    def forward(
        self,
        token_ids: Int[Tensor, "*batch seq"],
        cache: KVCache | None = None,
        targets: Int[Tensor, "*batch seq"] | None = None,
        token_positions: Int[Tensor, "*batch seq"] | None = None,
    ) -> Float[Tensor, "*batch seq vocab"] | Float[Tensor, ""]:
        """Logits of the token after each position, or the loss where `targets` are given.

        Args:
            token_ids: ids in [0, vocab_size), at most `context_length` positions.
            cache: the positions before `token_ids`, of which it has the keys and values; those of `token_ids` are
                added. The result is as if all were computed again.
            targets: the tokens that do follow. The result is then the mean cross-entropy in nats per token, by
                `lm.functional.linear_cross_entropy`, which spares memory in training.
            token_positions: by default, those after the cache. With a cache, each sequence of a batch may stand at
                others, below the cache's `length`: no shape changes from one position to the next.

        Raises:
            ValueError: more positions than `context_length`, or than the cache has room for.
        """
        start, limit = (0, self.config.context_length) if cache is None else (cache.length, cache.max_length)
        if (cache is None or token_positions is None) and start + token_ids.shape[-1] > limit:
            raise ValueError(
                f"{token_ids.shape[-1]} tokens after {start} exceed the "
                + (f"context_length={limit}" if cache is None else f"cache's max_length={limit}")
                + ": give fewer, for example the last ones"
            )
        x = self.token_embeddings(token_ids)
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if autocast and torch.get_autocast_dtype(device) == torch.bfloat16:  # float16 has too small a range for sums
            x = x.bfloat16()  # autocast leaves what is looked up in float32
        config = self.config
        for index, layer in enumerate(self.layers):
            values = None
            if index in self.value_layers:
                values = self.value_embeddings[str(index)](token_ids)
            arguments = (x, token_positions, cache.layers[index] if cache is not None else None, values)
            if config.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        if config.norm != "none":
            x = self.ln_final(x)
        head = self.lm_head if config.head == "untied" else self.token_embeddings
        if targets is not None:
            return linear_cross_entropy(x, head.weight, targets)
        return x @ head.weight.T

    def make_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `max_length` positions (default: the context length).

        Raises:
            ValueError: `max_length` exceeds the context length.
        """
        config, weight = self.config, self.token_embeddings.weight
        max_length = config.context_length if max_length is None else max_length
        if not 0 < max_length <= config.context_length:
            raise ValueError(f"max_length={max_length} must be in [1, context_length={config.context_length}]")
        layers = [
            LayerCache(batch_size, config.num_heads, max_length, config.d_head, weight.device, weight.dtype)
            for _ in self.layers
        ]
        return KVCache(layers, max_length)
