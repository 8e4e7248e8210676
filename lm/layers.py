"""The layers of the model, from `Linear` to `MultiHeadSelfAttention`, with the handout's names and initialisation."""

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import scaled_dot_product_attention as torch_attention
from torch.nn.init import trunc_normal_

from lm.functional import (
    causal_attention,
    gated_silu,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    squared_relu,
)
from lm.gradients import at_least_float32


def truncated_normal(
    *shape: int, std: float, device: torch.device | str | None, dtype: torch.dtype | None
) -> Parameter:
    """A parameter drawn from N(0, std^2), cut at three standard deviations."""
    return Parameter(trunc_normal_(torch.empty(*shape, device=device, dtype=dtype), std=std, a=-3 * std, b=3 * std))


class Linear(Module):
    """y = W x without bias; W is (out_features, in_features), drawn with variance 2 / (in + out).

    Glorot and Bengio 2010; CS336 A1 section 3.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        std = math.sqrt(2 / (in_features + out_features))
        self.weight = truncated_normal(out_features, in_features, std=std, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Multiply the last axis by W."""
        return x @ self.weight.T


class Embedding(Module):
    """One learned vector per token id.

    Args:
        num_embeddings: the number of token ids.
        embedding_dim: the length of each vector.
        std: of the initial entries; the handout's 1 fits an embedding with a head of its own.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = truncated_normal(num_embeddings, embedding_dim, std=std, device=device, dtype=dtype)

    def forward(self, token_ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Look the vectors up."""
        return self.weight[token_ids]


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, computed in float32 and returned in the dtype of x.

    `lm.functional.rms_norm` with learned gains.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Scale each vector to root mean square 1, then by the gains."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(Module):
    """W2(SiLU(W1 x) * W3 x), the gated feed-forward layer (Shazeer 2020; CS336 A1 section 3.4.2, equation 7)."""

    def __init__(
        self, d_model: int, d_ff: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.w3 = Linear(d_model, d_ff, device, dtype)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the layer at every position."""
        if torch.compiler.is_compiling():  # one product, which reads x once; eagerly, joining the weights costs more
            both = x @ torch.cat((self.w1.weight, self.w3.weight)).T
            return self.w2(gated_silu(*both.chunk(2, dim=-1)))
        return self.w2(gated_silu(self.w1(x), self.w3(x)))


class SiLUFeedForward(Module):
    """W2 SiLU(W1 x): the same without the gate; at d_ff = 4 d_model it has about as many parameters as SwiGLU."""

    def __init__(
        self, d_model: int, d_ff: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the layer at every position."""
        return self.w2(silu(self.w1(x)))


class SquaredReLUFeedForward(SiLUFeedForward):
    """W2 max(W1 x, 0)^2 (So et al. 2021, Primer): as many parameters as `SiLUFeedForward`, most activations zero."""

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the layer at every position."""
        return self.w2(squared_relu(self.w1(x)))


class RotaryPositionalEmbedding(Module):
    """Rotate pair j = (x[2j], x[2j+1]) of the vector at position i by the angle i * theta^(-2j / d_k).

    The product of a rotated query and a rotated key depends on their positions only through the difference.
    Su et al. 2021; CS336 A1 section 3.4.3, equation 8. The pairs are neighbours ("interleaved"), unlike the halves of
    Hugging Face's Llama. The tables stay float32 whatever the module is cast to, and are no part of the state dict.

    Args:
        theta: the base of the angles.
        d_k: the length of the vectors, even.
        max_seq_len: positions are in [0, max_seq_len).
        device: of the tables.

    Raises:
        ValueError: `d_k` is odd.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, theta: float, d_k: int, max_seq_len: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if d_k % 2:
            raise ValueError(f"d_k={d_k} must be even: RoPE rotates pairs of components")
        self.theta, self.d_k, self.max_seq_len = theta, d_k, max_seq_len
        cos, sin = self.tables(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all angles, (max_seq_len, d_k / 2), rounded to float32 once."""
        frequencies = self.theta ** (-torch.arange(0, self.d_k, 2, dtype=torch.float64) / self.d_k)
        angles = torch.arange(self.max_seq_len, dtype=torch.float64)[:, None] * frequencies
        return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryPositionalEmbedding":
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        device = self.cos.device
        self.cos, self.sin = self.tables(device) if cos.is_meta else (cos.to(device), sin.to(device))
        return self

    def forward(
        self, x: Float[Tensor, "*batch seq d_k"], token_positions: Int[Tensor, "*#batch seq"]
    ) -> Float[Tensor, "*batch seq d_k"]:
        """Rotate `x`, in float32, and return it in its own dtype."""
        cos, sin = self.cos[token_positions], self.sin[token_positions]
        pairs = at_least_float32(x).contiguous().unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # the compiler knows no complex numbers
            even, odd = pairs.unbind(-1)
            rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        else:
            rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
        return rotated.flatten(-2).to(x.dtype)


class LayerCache:
    """Keys and values of the positions that one attention layer has seen, with room for `max_length` of them.

    Attributes:
        length: the number of positions held; set it lower to forget the last ones.
    """

    def __init__(
        self, batch_size: int, num_heads: int, max_length: int, d_k: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.zeros(batch_size, num_heads, max_length, d_k, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(
        self, k: Float[Tensor, "batch heads seq d_k"], v: Float[Tensor, "batch heads seq d_k"]
    ) -> tuple[Float[Tensor, "batch heads keys d_k"], Float[Tensor, "batch heads keys d_k"]]:
        """Add the next positions; return views of all keys and values so far."""
        end = self.length + k.shape[-2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def place(
        self,
        k: Float[Tensor, "batch heads seq d_k"],
        v: Float[Tensor, "batch heads seq d_k"],
        positions: Int[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, "batch heads keys d_k"], Float[Tensor, "batch heads keys d_k"]]:
        """Write each sequence's keys and values at positions of its own, below `length`; return the first `length`.

        A sequence sees no more than its own positions if the caller masks the rest.
        """
        index = positions[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k.to(self.keys.dtype))  # under autocast they come in another one
        self.values.scatter_(2, index, v.to(self.values.dtype))
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def rows(self, which: slice) -> "LayerCache":
        """An empty cache for some of the sequences, in the same memory."""
        part = copy.copy(self)
        part.keys, part.values, part.length = self.keys[which], self.values[which], 0
        return part


class MultiHeadSelfAttention(Module):
    """Causal self-attention: `num_heads` attentions over slices of d_model / num_heads, joined by W_O.

    Vaswani et al. 2017, section 3.2.2; CS336 A1 section 3.4.5, equations 12-14. One matrix product makes the queries,
    keys and values of all heads; their weights stay three parameters, as in the reference state dict.

    Args:
        d_model: the length of the vectors in and out.
        num_heads: a divisor of `d_model`.
        rope: rotates queries and keys; None leaves the layer without positions.
        device: of the parameters.
        dtype: of the parameters.
        attention: "scratch" is `lm.functional.causal_attention`, "fused" torch's library kernel.
        qk_norm: RMSNorm, with gains, on every head's queries and keys (Dehghani et al. 2023; Henry et al. 2020), so
            that no score can grow without bound.
        gated: multiply the output of each head by 2 sigmoid(W_g x), which is 1 at first: a head can keep quiet where it
            has found nothing (Qiu et al. 2025).

    Raises:
        ValueError: `num_heads` does not divide `d_model`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        rope: RotaryPositionalEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention: Literal["scratch", "fused"] = "scratch",
        qk_norm: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model}")
        self.num_heads = num_heads
        self.rope = rope
        self.attention = attention
        self.q_proj = Linear(d_model, d_model, device, dtype)
        self.k_proj = Linear(d_model, d_model, device, dtype)
        self.v_proj = Linear(d_model, d_model, device, dtype)
        self.output_proj = Linear(d_model, d_model, device, dtype)
        self.qk_norm, self.gated = qk_norm, gated
        if qk_norm:
            self.q_norm = RMSNorm(d_model // num_heads, device=device, dtype=dtype)
            self.k_norm = RMSNorm(d_model // num_heads, device=device, dtype=dtype)
        if gated:
            self.gate = Linear(d_model, num_heads, device, dtype)
            self.gate.weight.data.zero_()

    def forward(
        self,
        x: Float[Tensor, "*batch seq d_model"],
        token_positions: Int[Tensor, "*#batch seq"] | None = None,
        cache: LayerCache | None = None,
        values: Float[Tensor, "*batch seq d_model"] | None = None,
    ) -> Float[Tensor, "*batch seq d_model"]:
        """Attend.

        Args:
            x: one vector per position.
            token_positions: by default 0, 1, 2, ... after what the cache holds. With a cache, each sequence stands at
                positions of its own there and sees those up to them (`LayerCache.place`).
            cache: the positions before `x`, to which those of `x` are added.
            values: added to the values that are computed from `x`.
        """
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        # for a single position, joining the weights would cost more than the product does
        qkv = torch.cat([x @ w.T for w in weights], -1) if x.shape[-2] == 1 else x @ torch.cat(weights).T
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).movedim((-3, -2), (0, -3))  # (*batch, heads, seq, d_k)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if values is not None:
            v = v + values.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
        if self.rope is not None:
            if token_positions is None:
                start = 0 if cache is None else cache.length
                positions = torch.arange(start, start + x.shape[-2], device=x.device)
            else:
                positions = token_positions.unsqueeze(-2)  # the same for every head
            q, k = self.rope(q, positions), self.rope(k, positions)
        if cache is not None and token_positions is not None:
            k, v = cache.place(k, v, token_positions)
            seen = torch.arange(k.shape[-2], device=x.device) <= token_positions[:, None, :, None]
            attend_to = scaled_dot_product_attention if self.attention == "scratch" else torch_attention
            mixed = attend_to(q, k, v, seen)
        else:
            if cache is not None:
                k, v = cache.append(k, v)
            attend = causal_attention if self.attention == "scratch" else fused_causal_attention
            mixed = attend(q, k, v)
        mixed = mixed.transpose(-3, -2)  # (*batch, seq, heads, d_k)
        if self.gated:
            mixed = mixed * (2 * torch.sigmoid(self.gate(x)))[..., None]
        return self.output_proj(mixed.flatten(-2))


def fused_causal_attention(
    q: Float[Tensor, "*batch queries d_k"],
    k: Float[Tensor, "*batch keys d_k"],
    v: Float[Tensor, "*batch keys d_v"],
) -> Float[Tensor, "*batch queries d_v"]:
    """`lm.functional.causal_attention` by torch's library kernel, a setting for speed."""
    queries, keys = q.shape[-2], k.shape[-2]
    if queries == keys:
        return torch_attention(q, k, v, is_causal=True)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return torch_attention(q, k, v, attn_mask=mask)
