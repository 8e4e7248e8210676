"""Pure functions of the model: softmax, SiLU, RMS normalisation, attention, cross-entropy.

The bodies are the textbook formulas. Run eagerly, the ones that cost most go to `lm.gradients` instead, which gives the
same numbers in fewer passes over memory; `torch.compile` sees the formulas.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm import gradients
from lm.gradients import at_least_float32

COMPILED_QUERIES = 256  # of one block of attention scores in compiled code: at 1024 positions 3 of 8 scores are spared


def softmax(x: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """exp(x) / sum(exp(x)) along `dim`, after subtracting the maximum so that exp cannot overflow.

    CS336 A1 section 3.4.4, equation 10.

    >>> softmax(torch.tensor([1000.0, 1000.0]), dim=0).tolist()
    [0.5, 0.5]
    """
    wide = at_least_float32(x)
    exponentials = torch.exp(wide - wide.amax(dim, keepdim=True).detach())  # it cancels out, and so does its gradient
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(x.dtype)


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x * sigmoid(x), also called swish (Elfwing et al. 2017; CS336 A1 section 3.4.2, equation 5)."""
    return x * torch.sigmoid(x)


def squared_relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return torch.relu(x).square()


def gated_silu(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(a) * b, the inside of SwiGLU."""
    if not torch.compiler.is_compiling():
        return gradients.GatedSiLU.apply(a, b)
    return silu(a) * b


def rms_norm(
    x: Float[Tensor, "*batch d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "*batch d_model"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 and returned in the dtype of x.

    Zhang and Sennrich 2019, equation 4; CS336 A1 section 3.4.1, equation 4.
    """
    if not torch.compiler.is_compiling():
        return gradients.RMSNorm.apply(x, weight, eps)
    wide = at_least_float32(x)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight).to(x.dtype)


def scaled_dot_product_attention(
    q: Float[Tensor, "*batch queries d_k"],
    k: Float[Tensor, "*batch keys d_k"],
    v: Float[Tensor, "*batch keys d_v"],
    mask: Bool[Tensor, "*#batch queries keys"] | None = None,
) -> Float[Tensor, "*batch queries d_v"]:
    """softmax(q k^T / sqrt(d_k)) v: for each query a mean of the values, weighted by how well their keys match it.

    Vaswani et al. 2017, equation 1; CS336 A1 section 3.4.4, equation 11.

    Args:
        q: queries.
        k: keys.
        v: values, one per key.
        mask: True where the query may look at the key, broadcast over the batch. A query that may look nowhere gets
            zeros, and passes no gradient.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is None:
        return softmax(scores, dim=-1) @ v
    lowest = torch.finfo(scores.dtype).min  # not -inf, whose softmax is NaN in a row without a key
    weights = softmax(scores.masked_fill(~mask, lowest), dim=-1)
    return weights.masked_fill(~mask, 0) @ v


def causal_attention(
    q: Float[Tensor, "*batch queries d_k"],
    k: Float[Tensor, "*batch keys d_k"],
    v: Float[Tensor, "*batch keys d_v"],
) -> Float[Tensor, "*batch queries d_v"]:
    """Attention in which a position sees itself and the positions before it.

    The queries are the last positions of the keys: with fewer queries than keys, the first keys are the past.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if queries == 1:
        return scaled_dot_product_attention(q, k, v)
    if q.is_cpu and q.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        blocks = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        return gradients.CausalAttention.apply(*blocks).view(*q.shape[:-1], v.shape[-1])
    block = COMPILED_QUERIES if torch.compiler.is_compiling() else queries
    v = v.contiguous()  # once, not for each block
    outputs = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        seen = keys - queries + end  # by the last query of the block: the keys after it need no scores
        mask = torch.ones(end - start, seen, dtype=torch.bool, device=q.device).tril(seen - (end - start))
        outputs.append(scaled_dot_product_attention(q[..., start:end, :], k[..., :seen, :], v[..., :seen, :], mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)


def cross_entropy(logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of `targets` under `softmax(logits)`, in nats per token.

    log(sum_a exp(o_a)) - o[target] after subtracting max(o), so that exp cannot overflow.
    CS336 A1 section 4.1, equations 16-17.

    Args:
        logits: unnormalised scores of any float dtype; reduced in float32.
        targets: token ids in [0, vocab), one per leading position of `logits`.
    """
    if not torch.compiler.is_compiling():
        return gradients.CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    wide = at_least_float32(logits)
    shifted = wide - wide.amax(-1, keepdim=True).detach()  # the maximum cancels out, so no gradient goes through it
    log_normaliser = shifted.exp().sum(-1).log()
    # A comparison fuses with the sums, forward and backward; the gradient of `gather` would be a tensor of zeros in
    # float32, as large as all logits, to scatter into.
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[..., None]
    return (log_normaliser - torch.where(is_target, shifted, 0).sum(-1)).mean()


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*batch"],
) -> Float[Tensor, ""]:
    """`cross_entropy` of the logits hidden W^T, in training without a place for all of them in float32.

    Run eagerly, at most 2^25 of them exist at a time; compiled, and without gradients, all do, in `hidden`'s dtype.

    Args:
        hidden: the last residual stream.
        weight: of the head.
        targets: token ids.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        rows = hidden.reshape(-1, hidden.shape[-1])
        return gradients.LinearCrossEntropy.apply(rows, weight, targets.reshape(-1))
    return cross_entropy(hidden @ weight.T, targets)


def perplexity(logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """exp of the mean cross-entropy: the number of equally likely tokens that would be as hard to guess.

    CS336 A1 section 4.1, equation 18.
    """
    return cross_entropy(logits, targets).exp()
