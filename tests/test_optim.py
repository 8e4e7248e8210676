"""Optimizers against torch.optim, schedules against the formula, clipping against torch."""

import copy
import math
import os
import socket
import threading
import time

import pytest
import torch
from torch import nn

from lm import optim
from lm.optim import SGD, AdamW, Muon, clip_gradients, cosine_schedule, orthogonalise, trapezoid_schedule


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 7), nn.Tanh(), nn.Linear(7, 5, bias=False))


def train(net, optimizer, steps, seed=0):
    """Fit random targets, with a batch per step that depends on the step alone."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x, y = torch.randn(16, 300, generator=generator), torch.randn(16, 5, generator=generator)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_adamw_equals_torch_over_100_steps(weight_decay, betas):
    ours, theirs = small_net().double(), small_net().double()
    options = {"lr": 1e-2, "betas": betas, "eps": 1e-20, "weight_decay": weight_decay}
    torch.set_default_dtype(torch.float64)
    try:
        train(ours, AdamW(ours.parameters(), **options), 100)
        train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 100)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_adamw_is_near_torch_in_float32_with_the_usual_eps():
    """torch adds eps to the bias-corrected root, the handout to the plain one: they differ by less than eps does."""
    ours, theirs = small_net(), small_net()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    train(ours, AdamW(ours.parameters(), **options), 100)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 100)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adamw_is_the_formula_written_out():
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([theta], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.5)
    expected, m, v = theta.detach().clone(), 0, 0
    for t in range(1, 6):
        gradient = torch.tensor([math.sin(t), math.cos(t)], dtype=torch.float64)
        theta.grad = gradient.clone()
        optimizer.step()
        expected = expected - 0.1 * 0.5 * expected
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        expected = expected - 0.1 * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-3)
    torch.testing.assert_close(theta.detach(), expected)


def test_adamw_goes_on_bit_for_bit_from_its_state(tmp_path):
    net = small_net()
    optimizer = AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    train(net, optimizer, 5)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(net, optimizer, 5, seed=1)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = small_net()
    resumed.load_state_dict(saved["net"])
    again = AdamW(resumed.parameters())
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 5, seed=1)
    for a, b in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adamw_leaves_parameters_without_a_gradient_alone():
    used, unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert not used.eq(1).any()
    assert unused.eq(1).all()
    assert unused not in optimizer.state


def test_adamw_takes_groups_with_options_of_their_own():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW([{"params": [parameters[0]], "weight_decay": 0.0}, {"params": [parameters[1]]}], weight_decay=0.5)
    for parameter in parameters:
        parameter.grad = torch.zeros(3)
    optimizer.step()
    assert parameters[0].eq(1).all()
    assert parameters[1].lt(1).all()


def test_adamw_takes_gradients_of_any_memory_layout():
    results = []
    for transpose in (False, True):
        torch.manual_seed(0)
        parameter, gradient = nn.Parameter(torch.randn(40, 30)), torch.randn(40, 30)
        parameter.grad = gradient.T.contiguous().T if transpose else gradient
        AdamW([parameter]).step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.fixture
def always_compiled(monkeypatch):
    """Small parameters take the compiled loop too."""
    monkeypatch.setattr(optim, "LARGE", 1)


def some_parameters():
    """Parameters with gradients, one of them in another memory layout."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in [(300, 70), (4099,), (5,), ()]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters[0].grad = parameters[0].grad.T.contiguous().T
    return parameters


def three_steps(parameters):
    optimizer = AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        for parameter in parameters:
            parameter.grad.mul_(-0.9 * step - 0.1)
        optimizer.step()
    return [tensor for p in parameters for tensor in (p.detach(), optimizer.state[p]["m"], optimizer.state[p]["v"])]


def test_the_compiled_loop_is_the_formula(always_compiled, monkeypatch):
    compiled = three_steps(some_parameters())
    monkeypatch.setattr(optim, "LARGE", 10**9)
    torch.testing.assert_close(compiled, three_steps(some_parameters()), rtol=1e-6, atol=1e-7)


def test_the_first_compilation_on_a_machine_is_announced(tmp_path, monkeypatch, capsys):
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    optim.compiled_update_elements.__wrapped__()
    assert "compiling AdamW (first use on this machine" in capsys.readouterr().err
    optim.compiled_update_elements.__wrapped__()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("piece", [1, 999, 2**20])
def test_the_compiled_loop_does_not_depend_on_pieces_and_threads(piece, always_compiled, monkeypatch):
    expected = three_steps(some_parameters())
    monkeypatch.setattr(optim, "PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for a, b in zip(expected, three_steps(some_parameters()), strict=True):
        assert torch.equal(a, b)


def test_the_compiled_loop_takes_what_it_can(always_compiled, monkeypatch):
    taken = []
    monkeypatch.setattr(optim, "compiled_adamw_update", lambda rows, *_: taken.extend(row.theta.shape for row in rows))
    others = [nn.Parameter(torch.ones(8, 9, dtype=torch.float64)), nn.Parameter(torch.ones(8, 9).T)]
    for parameter in others:
        parameter.grad = torch.ones_like(parameter)
    AdamW([*some_parameters(), *others], lr=0.1).step()
    assert taken == [(300, 70), (4099,), (5,), ()]
    assert all(not parameter.eq(1).any() for parameter in others)


def test_a_small_model_does_without_the_compiled_loop(monkeypatch):
    monkeypatch.delattr(optim, "compiled_adamw_update")
    three_steps(some_parameters())


def test_a_backward_pass_after_the_step_is_refused(always_compiled):
    (parameter, *_) = some_parameters()
    loss = parameter.square().sum()
    AdamW([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adamw_counts_the_steps_of_each_parameter():
    late, alone = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    early = nn.Parameter(torch.ones(3))
    optimizer = AdamW([early, late])
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.ones(3)
    optimizer.step()
    alone.grad = torch.ones(3)
    AdamW([alone]).step()
    assert torch.equal(late, alone)


def sharded_run(rank, port, results):
    """Three clipped steps of a net sharded over two processes; process 0 puts norm and weights into `results`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = fully_shard(small_net())
    optimizer = AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        x = torch.randn(16, 300, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        norm = clip_gradients(net.parameters(), 0.1)
        optimizer.step()
    assert all(isinstance(p, DTensor) for p in net.parameters())
    weights = [p.full_tensor().detach() for p in net.parameters()]
    if rank == 0:
        torch.save([norm, *weights], results)
    leave_together()


@pytest.mark.slow
def test_two_processes_with_sharded_parameters_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(sharded_run, (port, tmp_path / "weights.pt"), nprocs=2)
    norm, *weights = torch.load(tmp_path / "weights.pt", weights_only=True)

    net = small_net()
    optimizer = AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        x = torch.randn(16, 300, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        expected = clip_gradients(net.parameters(), 0.1)
        optimizer.step()
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(weights, [p.detach() for p in net.parameters()])


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 20, 7), (1, 7, 20)], ids=str)
def test_orthogonalising_keeps_the_directions_and_evens_out_their_strength(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for matrix, result in zip(matrices, orthogonalise(matrices), strict=True):
        u, strengths, vt = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ result @ vt.T
        assert strengths.max() / strengths.min() > 2
        assert inside.diag().min() > 0.65
        assert inside.diag().max() < 1.25
        torch.testing.assert_close(inside, inside.diag().diag(), rtol=0, atol=1e-4)
        torch.testing.assert_close(result, orthogonalise(matrix[None])[0], rtol=1e-4, atol=1e-5)


def test_orthogonalising_zeros_gives_zeros():
    assert orthogonalise(torch.zeros(2, 3, 4)).eq(0).all()


def muon_over(net, **options):
    """Muon for the two matrices of `small_net`, AdamW for its bias."""
    return Muon(net.parameters(), [p for p in net.parameters() if p.ndim == 2], **options)


def test_muon_is_the_formula_written_out():
    matrix = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([matrix], [matrix], 0.9, lr=0.1, weight_decay=0.5)
    expected, m = matrix.detach().clone(), 0
    for t in range(5):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1 + t))
        matrix.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        update = 0.2 * math.sqrt(6) * orthogonalise((0.9 * m + 0.1 * gradient)[None])[0]
        expected = expected - 0.1 * 0.5 * expected - 0.1 * update
        assert update.square().mean().sqrt() == pytest.approx(0.2, abs=0.05)
    torch.testing.assert_close(matrix.detach(), expected, rtol=1e-4, atol=1e-5)


def test_muon_leaves_the_rest_to_adamw():
    nets = [small_net(), small_net()]
    train(nets[0], muon_over(nets[0], lr=1e-2), 1)
    train(nets[1], AdamW(nets[1].parameters(), lr=1e-2), 1)
    assert torch.equal(nets[0][0].bias, nets[1][0].bias)
    assert not torch.allclose(nets[0][0].weight, nets[1][0].weight)


def test_matrices_of_one_shape_do_not_see_each_other():
    def run(count):
        torch.manual_seed(0)
        matrices = [nn.Parameter(torch.randn(5, 9)) for _ in range(3)]
        for matrix in matrices:
            matrix.grad = torch.randn(5, 9)
        optimizer = Muon(matrices[:count], matrices[:count])
        for _ in range(3):
            optimizer.step()
        return matrices[0].detach()

    torch.testing.assert_close(run(1), run(3))


def test_a_rate_of_its_own_is_that_of_an_optimizer_of_its_own():
    for make in (lambda p, **o: AdamW([p], **o), lambda p, **o: Muon([p], [p], **o)):
        results = []
        for lr, rate in ((0.06, 1.0), (0.02, 3.0)):
            parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4))
            optimizer = make(parameter, lr=lr, weight_decay=0.1, rates={parameter: rate})
            for step in range(3):
                parameter.grad = torch.sin(parameter.detach() + step)
                optimizer.step()
            results.append(parameter.detach())
        torch.testing.assert_close(*results)


def test_muon_goes_on_bit_for_bit_from_its_state(tmp_path):
    net = small_net()
    optimizer = muon_over(net, lr=1e-2)
    train(net, optimizer, 5)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(net, optimizer, 5, seed=1)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = small_net()
    resumed.load_state_dict(saved["net"])
    again = muon_over(resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 5, seed=1)
    for a, b in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_refuses_what_is_no_matrix():
    vector = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix"):
        Muon([vector], [vector])


def leave_together():
    """End both processes at once: taken down step by step, gloo's threads now and then abort one that is done."""
    torch.distributed.barrier()
    os._exit(0)


def muon_with_others(rank, port, results):
    """Three steps in which each of two processes orthogonalises its share; both put their weights into `results`."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(three_muon_steps(), f"{results}/{rank}.pt")
    leave_together()


def three_muon_steps():
    """Three matrices of one shape, which two processes cannot share equally, and one of another."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in [(8, 6), (8, 6), (8, 6), (4, 9)]]
    optimizer = Muon(matrices, matrices, lr=0.1)
    for step in range(3):
        for matrix in matrices:
            matrix.grad = torch.cos(matrix.detach() + step)
        optimizer.step()
    return [matrix.detach() for matrix in matrices] + [optimizer.state[matrices[2]]["m"]]


@pytest.mark.slow
def test_two_processes_share_muons_work_and_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(muon_with_others, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b, alone in zip(first, second, three_muon_steps(), strict=True):
        assert torch.equal(a, b), "replicas must not drift apart"
        torch.testing.assert_close(a, alone)


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_a_closure_is_run_with_gradients(optimizer_class):
    parameter = nn.Parameter(torch.ones(()))
    optimizer = optimizer_class([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1
    assert parameter < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"eps": -1.0}, "eps=-1.0 must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be in \[0, 1\)"),
    ],
)
def test_adamw_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(1))], **options)


def test_sgd_decays_its_step():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SGD([parameter], lr=2.0)
    expected = 0.0
    for t in range(4):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        expected -= 2.0 / math.sqrt(t + 1)
        assert parameter.item() == pytest.approx(expected)


def test_sgd_refuses_a_negative_rate():
    with pytest.raises(ValueError, match=r"lr=-1\.0 must not be negative"):
        SGD([nn.Parameter(torch.ones(1))], lr=-1.0)


def test_cosine_schedule_is_the_handouts_example():
    rates = [cosine_schedule(step, 1.0, 0.1, 7, 21) for step in range(25)]
    expected = [t / 7 for t in range(7)]
    expected += [0.1 + 0.45 * (1 + math.cos(math.pi * (t - 7) / 14)) for t in range(7, 22)]
    expected += [0.1] * 3
    assert rates == pytest.approx(expected)


def test_schedules_without_warm_up_or_decay():
    assert cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0
    assert cosine_schedule(5, 1.0, 0.1, 5, 5) == 0.1
    assert trapezoid_schedule(0, 1.0, 0.1, 0, 0, 10) == 1.0
    assert trapezoid_schedule(9, 1.0, 0.1, 0, 0, 10) == 1.0
    assert trapezoid_schedule(10, 1.0, 0.1, 0, 0, 10) == 0.1


def test_schedules_that_end_within_their_warm_up_end_at_the_minimum():
    for step, rate in ((39, 0.78), (40, 0.1)):
        assert cosine_schedule(step, 1.0, 0.1, 50, 40) == pytest.approx(rate)
        assert trapezoid_schedule(step, 1.0, 0.1, 50, 30, 40) == pytest.approx(rate)


def test_schedules_take_fractions_of_a_step():
    assert cosine_schedule(1.5, 1.0, 0.0, 2.0, 4.0) == 0.75
    assert trapezoid_schedule(7.5, 1.0, 0.0, 2.0, 1.0, 8.0) == 0.5


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
def test_clipping_equals_torch(max_norm):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(), (7,), (3, 4)]] + [nn.Parameter(torch.zeros(2))]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape)
    others = copy.deepcopy(parameters)
    for parameter, other in zip(parameters[:-1], others, strict=False):
        other.grad = parameter.grad.clone()
    norm = clip_gradients(parameters, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(others, max_norm))
    for a, b in zip(parameters[:-1], others, strict=False):
        torch.testing.assert_close(a.grad, b.grad)
    assert parameters[-1].grad is None


def test_clipping_float16_gradients_whose_squares_are_beyond_it():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    parameter.grad = torch.full((4,), 150.0, dtype=torch.float16)
    assert clip_gradients([parameter], max_norm=1.0) == 300
    assert parameter.grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_copied_optimizer_goes_on_with_the_copied_parameters(kind):
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    own = {"rates": {parameter: 0.5}, "lr": 0.1}
    optimizer = AdamW([parameter], **own) if kind == "adamw" else Muon([parameter], [parameter], **own)
    parameter.grad = torch.eye(3)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    ((other,),) = (group["params"] for group in copied.param_groups)
    other.grad = torch.eye(3)
    copied.step()
    assert not torch.equal(other, parameter)
    optimizer.step()
    assert torch.equal(other, parameter)


def test_clipping_a_generator_and_nothing():
    parameter = nn.Parameter(torch.zeros(2))
    assert clip_gradients([parameter], 1.0) == 0
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients((p for p in [parameter]), 1.0) == 5
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_clipping_a_norm_just_above_the_bound():
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([1.005])
    clip_gradients([parameter], 1.0)
    assert parameter.grad.item() == pytest.approx(1.0, abs=1e-5)


def test_clipping_shows_an_infinite_norm():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, math.inf])
    assert clip_gradients([parameter], 1.0) == math.inf


def test_a_step_ends_when_the_last_of_its_threads_does(monkeypatch):
    update = optim.compiled_update_elements()

    def slow_in_helpers(*piece):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        update(*piece)

    monkeypatch.setattr(optim, "LARGE", 1)
    monkeypatch.setattr(optim, "PIECE", 4)
    monkeypatch.setattr(optim, "compiled_update_elements", lambda: slow_in_helpers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    param = torch.nn.Parameter(torch.ones(16))
    param.grad = torch.ones(16)
    optim.AdamW([param], lr=0.1).step()
    assert (param < 1).all()
