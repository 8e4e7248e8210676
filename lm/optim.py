"""Optimizers, learning-rate schedules and gradient clipping."""

import functools
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, no_type_check

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

LARGE = 2**20  # elements of a group's parameters from which on it pays to load the compiled loop, in half a second
PIECE = 2**18  # elements that a thread takes at a time


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure computes, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class SGD(Optimizer):
    """Gradient descent with the step lr / sqrt(t + 1): the toy of the handout's learning_rate_tuning problem.

    CS336 A1 section 4.2, equation 20.

    Raises:
        ValueError: `lr` is negative.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        if lr < 0:
            raise ValueError(f"lr={lr} must not be negative")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; `closure`, if given, computes the loss and its gradients first."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    step = state.get("step", 0)
                    param.add_(param.grad, alpha=-group["lr"] / math.sqrt(step + 1))
                    state["step"] = step + 1
        return loss


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019; CS336 A1 section 4.3, algorithm 1).

    With the order of the 2026 handout, decay first: theta <- theta - lr * weight_decay * theta, then the moments
    m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, then theta <- theta - lr_t m / (sqrt(v) + eps) with
    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t). A parameter without a gradient is left alone.

    The state of a parameter is `step` (int) and `m`, `v` (like the parameter): enough to go on bit for bit.

    Args:
        params: tensors, or groups of them with options of their own.
        lr: the learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        rates: for some of the parameters, what their learning rate is as a multiple of `lr`. They stay in one group:
            a checkpoint knows parameters by their place, and groups would change it between DDP and FSDP.

    Attributes:
        compiled: on a GPU, let torch.compile make the update one walk over memory; False at first.

    Raises:
        ValueError: a negative `lr`, `eps` or `weight_decay`, or a beta outside [0, 1).
    """

    COPIED: tuple[str, ...] = ("rates", "compiled")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rates: Mapping[Tensor, float] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rates = dict(rates or {})
        self.compiled = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: torch's optimizers name their own attributes only."""
        return super().__getstate__() | {name: getattr(self, name) for name in self.COPIED}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; `closure`, if given, computes the loss and its gradients first."""
        loss = loss_of(closure)
        for group in self.param_groups:
            self.update([param for param in group["params"] if param.grad is not None], group)
        return loss

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update these parameters of a group; all have a gradient."""
        rows = []
        for param in params:
            state = self.state[param]
            if not state:
                state.update(step=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
            state["step"] += 1
            tensors = (local_part(tensor) for tensor in (param, gradient_of(param), state["m"], state["v"]))
            rows.append(Row(state["step"], group["lr"] * self.rates.get(param, 1.0), *tensors))
        options = group["betas"], group["eps"], group["weight_decay"]
        suited = [row for row in rows if suits_the_compiled_loop(row)]
        if sum(row.theta.numel() for row in suited) >= LARGE:
            compiled_adamw_update(suited, *options)
            rows = [row for row in rows if not suits_the_compiled_loop(row)]
        if rows:
            on_gpu = self.compiled and rows[0].theta.is_cuda
            (fused_adamw_update if on_gpu else adamw_update)(rows, *options)


class Row(NamedTuple):
    """A parameter with what its update needs; `step` counts from 1, `lr` is its own."""

    step: int
    lr: float
    theta: Tensor
    gradient: Tensor
    m: Tensor
    v: Tensor

    def rate(self, beta1: float, beta2: float) -> float:
        """lr_t in the docstring of `AdamW`."""
        return self.lr * math.sqrt(1 - beta2**self.step) / (1 - beta1**self.step)


def adamw_update(rows: list[Row], betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One update of all rows in place, by the formulas in the docstring of `AdamW`."""
    beta1, beta2 = betas
    _, _, thetas, gradients, ms, vs = (list(column) for column in zip(*rows, strict=True))
    torch._foreach_mul_(thetas, [1 - row.lr * weight_decay for row in rows])
    torch._foreach_lerp_(ms, gradients, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(thetas, ms, denominators, [-row.rate(beta1, beta2) for row in rows])


def fused_adamw_update(rows: list[Row], betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """`adamw_update` by kernels that torch.compile makes of it: each reads and writes its part of memory once.

    What changes from update to update goes in as tensors, so that nothing is compiled again; they are filled on the
    device, which takes no wait.
    """
    beta1, beta2 = betas
    _, _, thetas, gradients, ms, vs = (list(column) for column in zip(*rows, strict=True))
    numbers: dict[float, Tensor] = {}  # most rows share theirs

    def on_device(value: float) -> Tensor:
        if value not in numbers:
            numbers[value] = torch.full((), value, dtype=torch.float32, device=thetas[0].device)
        return numbers[value]

    decays = [on_device(1 - row.lr * weight_decay) for row in rows]
    rates = [on_device(row.rate(beta1, beta2)) for row in rows]
    compiled_adamw_formula()(thetas, gradients, ms, vs, decays, rates, beta1, beta2, eps)


@functools.cache
def compiled_adamw_formula() -> Callable[..., None]:
    """`adamw_formula`, compiled once per list of shapes."""
    return torch.compile(adamw_formula, dynamic=False)


@no_type_check  # the tests' checks would wrap it in what the compiler cannot look through
def adamw_formula(
    thetas: Any,
    gradients: Any,
    ms: Any,
    vs: Any,
    decays: Any,
    rates: Any,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The formulas of `AdamW` for lists of tensors; decays and rates are tensors of one number each."""
    torch._foreach_lerp_(ms, gradients, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_add(torch._foreach_sqrt(vs), eps)
    torch._foreach_mul_(thetas, decays)
    torch._foreach_sub_(thetas, torch._foreach_mul(torch._foreach_div(ms, denominators), rates))


def suits_the_compiled_loop(row: Row) -> bool:
    """Whether all tensors are float32 on a CPU, and those that are written each one block of memory."""
    _, _, theta, gradient, m, v = row
    return (
        theta.is_cpu
        and all(tensor.dtype == torch.float32 for tensor in (theta, gradient, m, v))
        and all(tensor.is_contiguous() for tensor in (theta, m, v))
    )


def compiled_adamw_update(rows: list[Row], betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """`adamw_update` in one walk over memory, where `adamw_update` takes one for each of its operations.

    Every element is computed alone, and without fused multiply-adds: the result does not depend on pieces and threads.
    """
    update = compiled_update_elements()
    beta1, beta2 = betas
    pieces = []
    for row in rows:
        _, lr, *tensors = row
        numbers = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, row.rate(beta1, beta2))
        arrays = [tensor.detach().contiguous().numpy().reshape(-1) for tensor in tensors]
        for start in range(0, arrays[0].size, PIECE):
            pieces.append((*(array[start : start + PIECE] for array in arrays), *numbers))
    remaining = iter(pieces)  # shared: whichever thread is free takes the next one

    def work() -> None:
        for piece in remaining:
            update(*piece)

    # threads of this step alone: those of a pool would be missing in a forked process
    helpers = [threading.Thread(target=work) for _ in range(min(torch.get_num_threads(), len(pieces)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    for row in rows:  # as torch does for its own operations in place, so that a late backward pass is refused
        torch.autograd.graph.increment_version((row.theta, row.m, row.v))


@functools.cache
def compiled_update_elements() -> Callable[..., None]:
    """`update_elements` for one-dimensional float32 arrays, compiled once per machine, to run without the GIL."""
    import numba
    from numba.core import event

    class Announcement(event.Listener):
        """Says, as the tokenizer does of its kernels, what takes so long."""

        def on_start(self, event: Any) -> None:
            if event.data["dispatcher"].py_func.__name__ == update_elements.__name__:
                print("lm: compiling AdamW (first use on this machine; cached from now on)", file=sys.stderr)

        def on_end(self, event: Any) -> None:
            pass

    array, number = numba.float32[::1], numba.float32
    compile_for = numba.njit(numba.void(*[array] * 4, *[number] * 6), nogil=True, cache=True, error_model="numpy")
    with event.install_listener("numba:compile", Announcement()):
        return compile_for(update_elements)


@no_type_check  # the tests' checks would wrap it in what Numba cannot compile
def update_elements(
    theta: Any,
    gradient: Any,
    m: Any,
    v: Any,
    old_theta: float,
    new_m: float,
    old_v: float,
    new_v: float,
    eps: float,
    rate: float,
) -> None:
    """The formulas of `AdamW`, element by element; all arguments are float32, so that all results are."""
    for i in range(theta.size):
        m[i] += new_m * (gradient[i] - m[i])
        v[i] = old_v * v[i] + new_v * (gradient[i] * gradient[i])
        theta[i] = old_theta * theta[i] - rate * m[i] / (math.sqrt(v[i]) + eps)


class Muon(AdamW):
    """Matrices move along the nearest orthogonal matrix of their momentum, everything else by AdamW.

    With m <- momentum m + (1 - momentum) g and Nesterov's look ahead, momentum m + (1 - momentum) g, the update is
    U V^T of its singular value decomposition U S V^T: all directions that a matrix has are learned at one speed, not
    only the few that dominate a gradient (Jordan et al. 2024, "Muon"). Scaled to entries of root mean square 0.2, it is
    as long as AdamW's usual one, so that both take about the same learning rate and weight decay (Liu et al. 2025,
    "Muon is scalable for LLM training", section 2.2).

    With several processes each orthogonalises its share of the matrices, and all get the results; gradients and state
    are the same everywhere, as under DDP. The state of a matrix is `step` and `m`.

    Args:
        params: as AdamW's.
        matrices: those of the parameters that are matrices in the sense of linear algebra: no embeddings, no gains.
        momentum: decay rate of the matrices' first moment.
        options: as AdamW's.

    Raises:
        ValueError: a matrix with other than two dimensions, or one of which this process has a part only (FSDP).
    """

    COPIED = (*AdamW.COPIED, "matrices", "momentum")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        matrices: Iterable[Tensor],
        momentum: float = 0.95,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.matrices = set(matrices)
        self.momentum = momentum
        for matrix in self.matrices:
            if matrix.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(matrix.shape)} is no matrix: leave it to AdamW")
            if local_part(matrix) is not matrix:
                raise ValueError("muon needs whole matrices, and FSDP cuts them: use trainer.strategy=ddp")

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update these parameters of a group; all have a gradient."""
        super().update([param for param in params if param not in self.matrices], group)
        by_shape = defaultdict(list)
        for param in params:
            if param in self.matrices:
                by_shape[param.shape].append(param)
        for alike in by_shape.values():
            self.update_matrices(alike, group)

    def update_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape, stacked: many small products in one."""
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state.update(step=0, m=torch.zeros_like(param))
            state["step"] += 1
        momenta = [state["m"] for state in states]
        gradients = [gradient_of(param) for param in params]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        directions = orthogonalise_together(torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum)))
        directions *= 0.2 * math.sqrt(max(params[0].shape))
        rates = [group["lr"] * self.rates.get(param, 1.0) for param in params]
        torch._foreach_mul_(params, [1 - rate * group["weight_decay"] for rate in rates])
        steps = list(directions)
        torch._foreach_mul_(steps, rates)
        torch._foreach_sub_(params, steps)


def orthogonalise_together(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """`orthogonalise`, each process taking an equal share of the batch, with the whole result for all of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return orthogonalise(matrices)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = -(-len(matrices) // world_size)
    own = matrices.new_zeros(share, *matrices.shape[1:])  # the last shares may be short, or empty
    mine = matrices[rank * share : (rank + 1) * share]
    own[: len(mine)] = orthogonalise(mine)
    everything = matrices.new_empty(world_size * share, *matrices.shape[1:])
    dist.all_gather_into_tensor(everything, own)
    return everything[: len(matrices)]


def orthogonalise(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Near U V^T for each matrix U S V^T: its singular values become 1, give or take 0.3.

    The Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X moves every singular value by the polynomial
    a s + b s^3 + c s^5, whose coefficients (Jordan et al. 2024) lift small ones quickest: five rounds bring all from
    0.002 on near 1. It needs products alone, and on a GPU the digits of bfloat16 suffice for it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices  # the smaller of the two products X X^T
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).to(matrices.dtype)


def gradient_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that is known to have one."""
    assert param.grad is not None
    return param.grad


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (a DTensor, under FSDP) that this process holds; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def cosine_schedule(
    step: int | float, max_lr: float, min_lr: float, warmup_steps: int | float, cosine_steps: int | float
) -> float:
    """The learning rate at `step`: linear warm-up, cosine annealing, then constant.

    step / warmup_steps * max_lr before `warmup_steps`; half a cosine from `max_lr` down to `min_lr` at
    `cosine_steps`; `min_lr` after it. CS336 A1 section 4.4.

    >>> [round(cosine_schedule(t, 1.0, 0.1, 2, 6), 3) for t in range(8)]
    [0.0, 0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    if step >= cosine_steps:
        return min_lr
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    progress = (step - warmup_steps) / (cosine_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def trapezoid_schedule(
    step: int | float,
    max_lr: float,
    min_lr: float,
    warmup_steps: int | float,
    decay_steps: int | float,
    total_steps: int | float,
) -> float:
    """The learning rate at `step`: linear warm-up, constant, then a linear way down over the last `decay_steps`.

    Also called warm-up, stable, decay (Hu et al. 2024). `min_lr` from `total_steps` on.

    >>> [round(trapezoid_schedule(t, 1.0, 0.0, 2, 4, 8), 2) for t in range(9)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step >= total_steps:
        return min_lr
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    remaining = (total_steps - step) / decay_steps if decay_steps else 1.0
    return min_lr + min(1.0, remaining) * (max_lr - min_lr)


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float, eps: float = 1e-6) -> Float[Tensor, ""]:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`; return the norm before.

    The factor is min(1, max_norm / (norm + eps)); it stays on the device, so nothing waits for the number.
    CS336 A1 section 4.5.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum().sqrt()
    if hasattr(norm, "full_tensor"):  # the gradients are sharded, under FSDP: sum over the processes
        norm = norm.full_tensor()
    factor = (max_norm / (norm + eps)).clamp(max=1.0)
    if factor.is_cpu and factor == 1:  # on a CPU it is known by now, and a walk over the gradients can be spared
        return norm
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor)
    return norm
