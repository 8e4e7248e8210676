"""The functions of `lm.functional` with gradients derived by hand, for eager execution.

Autograd keeps a tensor for every step of a formula and walks over memory once more for each. These keep the inputs,
reduce in place, and compute the rest again. Compiled code does not need them: the compiler sees the formula and
fuses it.
"""

# ruff: noqa: D102 (the classes' docstrings say what forward and backward are)

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

HEADS, QUERIES = 32, 64  # of one block of attention scores: with some hundred keys they stay in a core's cache
ROWS = 64  # of logits at a time on a CPU, for the same reason; a GPU has enough to do with as many as may exist
LOGITS = 2**25  # the most logits that `LinearCrossEntropy` holds at once: 128 MiB in float32


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is when its dtype is wider: sums and exponentials need the digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), row by row; keeps x, w and r.

    dx = r (g w - x r^2 mean(g w x)) and dw = sum over rows of g x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_float32(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        d_model = x.shape[-1]
        wide = x.to(inverse_rms.dtype).reshape(-1, d_model)
        gradient = gradient.to(inverse_rms.dtype).reshape(-1, d_model)
        inverse_rms = inverse_rms.reshape(-1)
        product = gradient * wide
        d_weight = inverse_rms @ product
        mean = (product @ weight.to(product.dtype)).mul_(inverse_rms.square()).div_(d_model)
        dx = torch.mul(gradient, weight, out=product).addcmul_(wide, mean[:, None], value=-1).mul_(inverse_rms[:, None])
        return dx.view_as(x).to(x.dtype), d_weight.to(weight.dtype), None


class GatedSiLU(Function):
    """y = silu(a) b with silu(a) = a s, s = sigmoid(a); keeps a and b.

    da = g b (s + silu(a) (1 - s)) and db = g silu(a).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.sigmoid(a).mul_(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        silu = a * sigmoid
        da = torch.addcmul(sigmoid, silu, sigmoid, value=-1).add_(silu).mul_(b).mul_(gradient)
        return da, silu.mul_(gradient)


class CausalAttention(Function):
    """softmax(q k^T / sqrt(d_k)) v under the causal triangle, for (heads, positions, d) and in blocks of queries.

    A block computes the scores of its queries and the keys up to the last of them, so the masked half is never
    touched. Kept are q, k, v, the output o and log sum exp of each row of scores, from which the backward pass has the
    weights p again (Dao et al. 2022, algorithms 1 and 4):

    dv = p^T g;  dp = g v^T;  ds = p (dp - rowsum(g o));  dq = ds k / sqrt(d_k);  dk = ds^T q / sqrt(d_k).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = v.new_empty(*q.shape[:2], v.shape[2])
        log_sum_exp = q.new_empty(*q.shape[:2], 1)
        future = masked_triangle(q)
        for heads, rows, keys in attention_blocks(q, k):
            scores = scaled(q[heads, rows]) @ k[heads, keys].transpose(1, 2)
            mask_future_(scores, future)
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            total = weights.sum(-1, keepdim=True)
            torch.div(weights @ v[heads, keys], total, out=output[heads, rows])
            torch.add(highest, total.log_(), out=log_sum_exp[heads, rows])
        ctx.save_for_backward(q, k, v, output, log_sum_exp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, output, log_sum_exp = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        row_sum = (gradient * output).sum(-1, keepdim=True)
        future = masked_triangle(q)
        for heads, rows, keys in attention_blocks(q, k):
            queries, g = scaled(q[heads, rows]), gradient[heads, rows]
            scores = queries @ k[heads, keys].transpose(1, 2)
            mask_future_(scores, future)
            weights = scores.sub_(log_sum_exp[heads, rows]).exp_()
            dv[heads, keys] += weights.transpose(1, 2) @ g
            d_scores = (g @ v[heads, keys].transpose(1, 2)).sub_(row_sum[heads, rows]).mul_(weights)
            dq[heads, rows] = scaled(d_scores @ k[heads, keys])
            dk[heads, keys] += d_scores.transpose(1, 2) @ queries
        return dq, dk, dv


def attention_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of heads, of queries, and of the keys that these queries may see; the last query sees all keys."""
    (num_heads, num_queries, _), past = q.shape, k.shape[1] - q.shape[1]
    for head in range(0, num_heads, HEADS):
        for start in range(0, num_queries, QUERIES):
            end = min(start + QUERIES, num_queries)
            yield slice(head, head + HEADS), slice(start, end), slice(0, past + end)


def scaled(x: Tensor) -> Tensor:
    """x / sqrt(d_k): on the queries, where it costs least, and once more on the way back."""
    return x * x.shape[-1] ** -0.5


def masked_triangle(q: Tensor) -> Tensor:
    """-inf above the diagonal of a block of queries and as many keys, 0 elsewhere."""
    return q.new_full((QUERIES, QUERIES), -math.inf).triu(1)


def mask_future_(scores: Tensor, future: Tensor) -> None:
    """Mask the last keys of a block, the only ones that a query of it may not see."""
    rows = scores.shape[1]
    scores[:, :, -rows:].add_(future[:rows, :rows])


class CrossEntropy(Function):
    """mean over rows of log sum exp(logits - max) - (logits[target] - max); keeps the logits, and max and sum per row.

    dlogits = g (softmax(logits) - onehot(target)) / rows.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets[:, None]
        highest = at_least_float32(logits.amax(-1, keepdim=True))
        total = torch.cat(
            [(x - m).exp_().sum(-1, keepdim=True) for x, m in zip(*in_rows(logits, highest), strict=True)]
        )
        ctx.save_for_backward(logits, targets, highest, total)
        return (total.log() - (logits.gather(-1, targets) - highest)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, highest, total = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        scale = gradient / len(logits)
        blocks = zip(*in_rows(logits, targets, highest, scale / total, d_logits), strict=True)
        for x, target, m, factor, d_x in blocks:
            softmax = (x - m).exp_().mul_(factor)
            d_x.copy_(softmax.scatter_add_(-1, target, -scale.expand(target.shape)))
        return d_logits, None


def in_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each tensor its blocks of rows: of logits, the first of them, `ROWS`, or on a GPU up to `LOGITS` in all."""
    rows = ROWS if tensors[0].is_cpu else max(1, LOGITS // tensors[0].shape[-1])
    return (tensor.split(rows) for tensor in tensors)


class LinearCrossEntropy(Function):
    """Cross-entropy of the logits h W^T, which become their own gradient in place, a bounded number at a time.

    dlogits = (softmax(logits) - onehot(target)) g / rows;  dh = dlogits W;  dW = dlogits^T h. All but the factor
    g / rows is known in the forward pass: kept are dh and dW, and of the logits nothing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        d_hidden, d_weight = torch.empty_like(hidden), None
        loss = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        rows = max(1, LOGITS // len(weight))
        for h, target, dh in zip(*(x.split(rows) for x in (hidden, targets, d_hidden)), strict=True):
            logits = at_least_float32(h @ weight.T)
            loss += summed_loss_and_gradient_(logits, target)
            d_logits = logits.to(weight.dtype)
            dh.copy_(d_logits @ weight)
            product = (d_logits.T @ h).to(weight.dtype)
            d_weight = product if d_weight is None else d_weight.add_(product)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradient / len(d_hidden)
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale.to(d_weight.dtype), None


def summed_loss_and_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy; the logits are overwritten with its gradient, softmax - onehot."""
    losses = []
    for block, target in zip(*in_rows(logits, targets[:, None]), strict=True):
        block.sub_(block.amax(-1, keepdim=True))
        chosen = block.gather(-1, target)
        total = block.exp_().sum(-1, keepdim=True)
        losses.append(total.log().sub_(chosen))
        block.div_(total).scatter_add_(-1, target, total.new_full((), -1).expand(target.shape))
    return torch.cat(losses).sum()
