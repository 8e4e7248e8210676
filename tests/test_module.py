"""The training recipe: schedule, loss, optimizer and validation, as the Trainer runs them."""

import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from toy import SETTINGS, make_dataset, rows

from lm import cli
from lm.checkpoint import load_model
from lm.data import TokenDataModule, WindowOrder, get_batch, open_split
from lm.model import TransformerConfig, TransformerLM
from lm.module import LanguageModel, LearningRate, OptimizerConfig, ScheduleConfig, TokenLoss, compiled
from lm.optim import Muon

RUN = Path("logs/toy/version_0")
Fit = Callable[..., int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def fit(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])

    def fit(*arguments: str) -> int:
        return cli.main(["fit", f"--data.directory={dataset}", *SETTINGS, *arguments], time.monotonic())

    return fit


# ---------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("shape", ["cosine", "trapezoid"])
def test_the_rate_rises_to_the_highest_and_ends_at_the_lowest_with_the_last_update(shape: Any) -> None:
    schedule = ScheduleConfig(shape=shape, warmup_steps=10, min_lr_ratio=0.1)
    rates = [schedule.rate(step, 100.0, 2.0) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2), "the first update is not lost"
    assert max(rates) == pytest.approx(2.0)
    assert rates[9] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_the_rate_of_a_trapezoid_falls_in_its_share_of_the_run() -> None:
    schedule = ScheduleConfig(shape="trapezoid", warmup_steps=10, min_lr_ratio=0.0, decay_ratio=0.5)
    assert [schedule.rate(step, 100.0, 2.0) for step in (50, 75, 100)] == pytest.approx([2.0, 1.0, 0.0])


def test_context_lengths_may_be_given_in_any_order() -> None:
    schedule = ScheduleConfig(context_lengths={50: 8, 10: 4})
    assert [schedule.context_length(progress) for progress in (0.0, 0.1, 0.49, 0.5, 1.0)] == [None, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("max_steps", "clock_progress", "step", "num_steps"),
    [(100, 0.5, 10, 20), (100, 0.5, 80, 100), (-1, 0.5, 80, 160), (100, 0.0, 0, 100), (100, 0.1, 0, 100)],
)
def test_a_run_by_the_clock_is_as_long_as_its_time_but_no_longer_than_its_steps(
    max_steps: int, clock_progress: float, step: int, num_steps: int
) -> None:
    module = LanguageModel(TransformerConfig(257), schedule=ScheduleConfig(follow="clock"))
    module._trainer = SimpleNamespace(max_steps=max_steps)  # type: ignore[assignment]
    module.clock_progress = clock_progress
    assert module.num_steps(step) == num_steps


def test_the_running_loss_weighs_each_token_alike_in_whatever_parts_it_comes() -> None:
    losses, counts = torch.rand(7, dtype=torch.float64), [1, 20, 3, 512, 7, 1, 90]
    whole, *ranks = TokenLoss(), TokenLoss(), TokenLoss()
    for i, (loss, count) in enumerate(zip(losses, counts, strict=True)):
        whole.update(loss, count)
        ranks[i % 2].update(loss, count)
    expected = np.average(losses, weights=counts)
    assert float(whole.compute()) == pytest.approx(expected, rel=1e-14)
    ranks[0].merge_state(ranks[1])
    assert float(ranks[0].compute()) == pytest.approx(expected, rel=1e-14)
    whole.reset()
    whole.update(torch.tensor(2.0), 5)
    assert float(whole.compute()) == 2.0


def test_a_resumed_schedule_is_the_one_given_now() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    old = LearningRate(optimizer, lambda step: 1.0 / step)
    for _ in range(3):
        old.step()
    new = LearningRate(optimizer, lambda step: 10.0 * step)
    new.load_state_dict(old.state_dict())
    assert optimizer.param_groups[0]["lr"] == 40.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(lr=0.0), "lr=0.0 must be positive"),
        (lambda: OptimizerConfig(lr=math.nan), "lr=nan must be positive"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "betas="),
        (lambda: OptimizerConfig(matrix_lr=0.0), "matrix_lr=0.0 must be positive"),
        (lambda: OptimizerConfig(momentum=1.0), "momentum=1.0 must be in"),
        (lambda: OptimizerConfig(eps=-1e-8), "eps=-1e-08 must not be negative"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "weight_decay=-0.1 must not be negative"),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps=-1 must not be negative"),
        (lambda: ScheduleConfig(min_lr_ratio=1.5), "min_lr_ratio=1.5 must be in"),
        (lambda: ScheduleConfig(decay_ratio=-0.1), "decay_ratio=-0.1 must be in"),
        (lambda: ScheduleConfig(context_lengths={0: 0}), "must give lengths for percentages"),
        (lambda: ScheduleConfig(context_lengths={100: 8}), "must give lengths for percentages"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_every_part_of_the_model_has_its_own_rate(matrices: Any) -> None:
    config = TransformerConfig(40, 12, 3, 2, 16, 32, qk_norm=True, value_embeddings=True)
    model = TransformerLM(config)
    rates = {"matrix_lr": 0.4, "embedding_lr": 0.3, "head_lr": 0.2, "scalar_lr": 0.1}
    optimizer = OptimizerConfig(lr=0.1, matrices=matrices, momentum=0.9, **rates).make(model)
    names = {name: round(optimizer.rates[parameter], 6) for name, parameter in model.named_parameters()}
    assert names["layers.0.attn.q_proj.weight"] == names["layers.2.ffn.w3.weight"] == 4
    assert names["token_embeddings.weight"] == names["value_embeddings.0.weight"] == 3
    assert names["lm_head.weight"] == 2
    assert names["layers.1.attn.q_norm.weight"] == names["ln_final.weight"] == 1
    assert len(optimizer.param_groups) == 1
    if matrices == "muon":
        assert isinstance(optimizer, Muon)
        assert len(optimizer.matrices) == 3 * 7
        assert optimizer.momentum == 0.9
        assert all(optimizer.rates[matrix] == pytest.approx(4) for matrix in optimizer.matrices)


def test_a_rate_for_a_head_that_is_not_there_is_refused() -> None:
    tied = TransformerLM(TransformerConfig(40, 12, 1, 2, 16, 32, head="tied"))
    with pytest.raises(ValueError, match=r"head_lr=0\.1, but head=tied"):
        OptimizerConfig(head_lr=0.1).make(tied)


# -------------------------------------------------------------------------------------------------------- validation


def test_the_mean_over_batches_of_different_sizes_is_that_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(1000, generator=generator, dtype=torch.float64)
    metric = TokenLoss()
    for part in losses.split([1, 499, 300, 200]):
        metric.update(part.mean().float(), len(part))
    assert metric.compute().item() == pytest.approx(losses.mean().item(), abs=1e-7)
    assert metric.compute().dtype == torch.float64


def test_the_validation_loss_is_that_of_torch_over_every_target(fit: Fit, dataset: Path) -> None:
    assert fit("--data.val_batch_size=3") == 0
    model, _ = load_model(max(RUN.glob("checkpoints/*.ckpt")))
    tokens = torch.from_numpy(open_split(dataset, "valid")[:].astype("int64"))
    nats, context = 0.0, 16
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, context):
            window = tokens[begin : begin + context + 1]
            nats += F.cross_entropy(model(window[:-1]), window[1:], reduction="sum").item()
    loss = nats / (len(tokens) - 1)
    result = json.loads((RUN / "summary.json").read_text())["validation"]
    assert result["val/loss"] == pytest.approx(loss, abs=1e-5)
    assert result["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    num_bytes = json.loads((dataset / "meta.json").read_text())["splits"]["valid"]["num_bytes"]
    assert result["val/bits_per_byte"] == pytest.approx(loss / math.log(2) * len(tokens) / num_bytes, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("staged", [False, True], ids=["plain", "staged"])
def test_the_trainer_takes_the_steps_of_a_plain_loop(fit: Fit, dataset: Path, staged: bool) -> None:
    """The same windows, clipping, rate and AdamW (torch's) in ten lines give the same losses."""
    stages = ["--model.schedule.context_lengths={0: 4, 50: 8}"] if staged else []
    assert fit("--trainer.gradient_clip_val=0.5", "--seed_everything=3", *stages) == 0
    torch.manual_seed(3)
    config = TransformerConfig(
        vocab_size=257, context_length=16, num_layers=1, num_heads=2, d_model=16, d_ff=32, head="tied"
    )
    model, schedule = TransformerLM(config), ScheduleConfig(warmup_steps=2, min_lr_ratio=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = open_split(dataset, "train")
    order = WindowOrder(len(tokens), 16, seed=3)
    logged = [row for row in rows(RUN) if "train/loss" in row]
    assert len(logged) == 8
    lengths = [4] * 4 + [8] * 4 if staged else [16] * 8
    for step, row in enumerate(logged, start=1):
        starts = order.starts(4 * (step - 1), 4)
        inputs, targets = (x.view(-1, lengths[step - 1]) for x in get_batch(tokens, 4, 16, "cpu", starts))
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = schedule.rate(step, 8.0, 5e-3)
        optimizer.step()
        assert row["train/loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), abs=1e-3)
        assert row["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert row["tokens_seen"] == 64 * step


def test_a_norm_of_0_clips_nothing(fit: Fit) -> None:
    for norm in ("0.0", "1e9", "0.5"):
        assert fit(f"--run.name=at-{norm}", f"--trainer.gradient_clip_val={norm}") == 0
    none, high, low = (rows(Path(f"logs/at-{norm}/version_0")) for norm in ("0.0", "1e9", "0.5"))
    assert none == high != low


def test_muon_refuses_a_part_of_a_matrix() -> None:
    matrix: Any = torch.nn.Parameter(torch.zeros(4, 4))
    matrix.to_local = lambda: matrix[:2]  # as of a DTensor
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        Muon([matrix], [matrix])


def test_a_context_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="100 must divide context_length=256"):
        LanguageModel(TransformerConfig(vocab_size=257), schedule=ScheduleConfig(context_lengths={0: 100}))


@pytest.mark.slow
def test_accumulated_batches_are_one_larger_batch(fit: Fit) -> None:
    assert fit("--run.name=one", "--data.batch_size=8") == 0
    assert fit("--run.name=two", "--data.batch_size=4", "--trainer.accumulate_grad_batches=2") == 0
    one, two = rows(Path("logs/one/version_0")), rows(Path("logs/two/version_0"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], abs=1e-4), name


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_bfloat16_trains_and_measures_in_float64(fit: Fit, precision: str) -> None:
    assert fit(f"--trainer.precision={precision}", "--trainer.max_steps=30", "--model.optimizer.lr=0.02") == 0
    weights = torch.load(max(RUN.glob("checkpoints/*.ckpt")), weights_only=True)["state_dict"]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    losses = [row["val/loss"] for row in rows(RUN) if "val/loss" in row]
    assert losses[-1] < losses[0]
    assert losses[-1] != pytest.approx(torch.tensor(losses[-1]).bfloat16().item(), abs=1e-9)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(fit: Fit) -> None:
    assert fit("--run.name=plain") == 0
    assert fit("--run.name=again", "--model.transformer.activation_checkpointing=true") == 0
    assert rows(Path("logs/plain/version_0")) == rows(Path("logs/again/version_0"))


@pytest.mark.slow
def test_compiled_or_not_the_run_is_the_same_and_checkpoints_go_both_ways(dataset: Path, tmp_path: Path) -> None:
    """In a process of its own: the compiler cannot look through the shape checks of the test run."""
    on = "--model.compile=true"
    further = ["--resume=must", "--trainer.max_steps=10"]
    runs = [["--run.name=a"], ["--run.name=b", on], ["--run.name=a", on, *further], ["--run.name=b", *further]]
    commands = [["fit", f"--data.directory={dataset}", *SETTINGS, *arguments] for arguments in runs]
    program = (
        "import json, sys, time\n"
        "from lm import cli\n"
        f"sys.exit(max(cli.main(arguments, time.monotonic()) for arguments in json.loads({json.dumps(commands)!r})))"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
    }
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    a, b = (rows(tmp_path / f"logs/{name}/version_0") for name in "ab")
    assert [row["step"] for row in a if "lr" in row] == list(range(1, 11))
    for one, other in zip(a, b, strict=True):
        assert other == pytest.approx(one, abs=1e-3)


def test_how_the_weights_began_may_be_set_otherwise_when_a_run_goes_on(fit: Fit) -> None:
    assert fit("--trainer.max_steps=4") == 0
    assert fit("--resume=must", "--trainer.max_steps=6", "--model.transformer.init=zero_output") == 0
    assert rows(RUN)[-1]["step"] == 6


def test_a_checkpoint_from_before_an_option_goes_on_and_one_of_another_optimizer_is_refused(fit: Fit) -> None:
    assert fit("--trainer.max_steps=4") == 0
    path = max(RUN.glob("checkpoints/*.ckpt"))
    contents = torch.load(path, weights_only=True)
    for name in ("init", "qk_norm", "gated_attention", "value_embeddings"):
        del contents["transformer"][name]
    del contents["matrices"]
    contents["transformer"] |= {"logit_softcap": None, "unet_skips": False}  # options that are no more, off
    contents["TokenDataModule"]["batch_schedule"] = {}
    torch.save(contents, "old.ckpt")
    tied = "--model.transformer.head=tied"  # as configs/builtin.yaml, which is not below a checkpoint without its run
    assert fit("--ckpt_path=old.ckpt", tied) == 0
    assert [row["step"] for row in rows(RUN.with_name("version_1")) if "lr" in row] == list(range(5, 9))
    assert fit("--ckpt_path=old.ckpt", tied, "--model.optimizer.matrices=muon") == 2


def test_a_checkpoint_that_used_an_option_which_is_no_more_is_refused_by_name() -> None:
    module = LanguageModel(TransformerConfig(vocab_size=257))
    module._trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
    saved: dict[str, Any] = {"transformer": dataclasses.asdict(module.transformer)}
    module.on_load_checkpoint(saved)
    with pytest.raises(ValueError, match="averaged its weights, a setting that is no more"):
        module.on_load_checkpoint(saved | {"averaged": {}})
    with pytest.raises(ValueError, match=r"logit_softcap=15\.0 is a setting that is no more"):
        module.on_load_checkpoint({"transformer": saved["transformer"] | {"logit_softcap": 15.0}})


def test_a_checkpoint_is_plain_and_names_its_model(fit: Fit) -> None:
    assert fit() == 0
    checkpoint = torch.load(max(RUN.glob("checkpoints/*.ckpt")), weights_only=True)
    assert checkpoint["transformer"]["norm"] == "pre"
    assert checkpoint["transformer"]["vocab_size"] == 257
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])
    with pytest.raises(ValueError, match="not written by `python -m lm fit`"):
        LanguageModel(TransformerConfig(vocab_size=257)).on_load_checkpoint({})


def test_each_shape_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        seen.append([size for tensor in inputs for size in tensor.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    twice = compiled(lambda x: 2 * x, True)
    for batch_size in (64, 128):  # validation, then training
        assert twice(torch.ones(batch_size, 8)).shape == (batch_size, 8)
    assert seen == [[64, 8], [128, 8]]
    assert all(type(size) is int for sizes in seen for size in sizes)


def test_a_mode_is_the_compilers_and_what_a_graph_replays_is_copied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: modes.append(options["mode"]) or function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    loss = torch.ones(())
    for mode in (True, "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"):
        copied = compiled(lambda: loss, mode)() is not loss  # type: ignore[arg-type]
        assert copied == (mode in ("reduce-overhead", "max-autotune"))
    assert modes == [None, "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"]


def test_a_loss_too_high_for_a_perplexity_is_no_crash() -> None:
    module = LanguageModel(TransformerConfig(257, 16, 1, 2, 8, 16))
    module._trainer = MagicMock(Trainer, datamodule=None)
    module.log_dict = lambda *args, **kwargs: None
    module.on_validation_epoch_start()
    module.validation_loss.update(torch.tensor(1000.0), 3)
    module.on_validation_epoch_end()
    assert module.validation_result["val/loss"] == 1000


@pytest.mark.parametrize(("loss", "gradient"), [(math.inf, 1.0), (1.0, math.inf)])
def test_an_update_that_was_not_finite_is_not_forgotten_with_the_next(loss: float, gradient: float) -> None:
    module = LanguageModel(TransformerConfig(257, 16, 1, 2, 8, 16))
    module.model = TransformerLM(module.transformer)
    module._trainer = MagicMock(Trainer, precision_plugin=SimpleNamespace())
    module._reset_step()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    seen = []
    for step_loss, element in ((1.0, 1.0), (loss, gradient), (1.0, 1.0)):
        module.step_loss = torch.tensor(step_loss)
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, element)
        module.configure_gradient_clipping(optimizer, 1.0)
        seen.append(bool(module.nonfinite))
    assert seen == [False, True, True]


@pytest.mark.parametrize(("tokens", "rows"), [(257, 300), (320, 320)])
def test_the_vocabulary_is_as_large_as_the_checkpoint_and_the_data_need(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int
) -> None:
    monkeypatch.setattr("lm.module.peek", lambda path: (TransformerConfig(300), {}))
    module = LanguageModel(TransformerConfig(40))
    module._trainer = MagicMock(Trainer, ckpt_path="some.ckpt", datamodule=SimpleNamespace(meta={"vocab_size": tokens}))
    module.setup("fit")
    assert module.transformer.vocab_size == rows


def test_a_share_without_targets_changes_no_figure_and_the_texts_entropy_is_among_them() -> None:
    module = LanguageModel(TransformerConfig(257, 16, 1, 2, 8, 16))
    module.model = TransformerLM(module.transformer)
    split = {"num_tokens": 2, "num_bytes": 4, "entropy_bits_per_byte": 0.5}
    module._trainer = MagicMock(Trainer, datamodule=SimpleNamespace(meta={"splits": {"valid": split}}))
    module.log_dict = lambda *args, **kwargs: None
    results, ids = [], torch.arange(16).view(2, 8)
    for counts in ([16], [16, 0]):
        module.on_validation_epoch_start()
        for count in counts:
            module.validation_step((ids, ids, count), 0)
        module.on_validation_epoch_end()
        results.append(module.validation_result)
    assert results[0] == results[1]
    assert results[0]["val/entropy_bits_per_byte"] == 0.5


def test_the_first_weights_depend_on_the_seed_alone_and_a_second_stage_makes_nothing_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr("lm.module.compiled", lambda function, mode: modes.append(mode) or function)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    weights = []
    for _ in range(2):
        torch.rand(5)  # as preparing data may
        module = LanguageModel(TransformerConfig(257, 16, 1, 2, 8, 16), compile=True)
        module._trainer = MagicMock(Trainer, ckpt_path=None)
        module.configure_model()
        module.configure_model()
        weights.append(module.model.token_embeddings.weight)
    assert torch.equal(*weights)
    assert modes == [True, True]


def test_weights_of_another_model_are_not_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(257, 16, 1, 2, 8, 16)
    other = TransformerLM(dataclasses.replace(config, norm="post"))
    monkeypatch.setattr("lm.module.load_model", lambda path, device: (other, {"data": {}}))
    module = LanguageModel(config, init_from="some.ckpt")
    module._trainer = MagicMock(Trainer, ckpt_path=None, training=True)
    with pytest.raises(ValueError, match=r"init_from=some\.ckpt is of another model: norm: checkpoint post, now pre"):
        module.configure_model()


def test_a_checkpoint_becomes_a_module_that_answers_and_trains_on(fit: Fit, dataset: Path) -> None:
    assert fit() == 0
    model, _ = load_model(RUN)
    module = LanguageModel.load_from_checkpoint(RUN, optimizer=OptimizerConfig(lr=1e-2))
    ids = torch.arange(1, 17)[None]
    assert torch.equal(module(ids), model(ids))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = TokenDataModule(directory=str(dataset), context_length=16, batch_size=4)
    before = model.token_embeddings.weight
    Trainer(accelerator="cpu", max_steps=2, limit_val_batches=1, use_distributed_sampler=False, **quiet).fit(
        module, data
    )
    assert 0 < (module.model.token_embeddings.weight - before).abs().max() < 0.1, "from where it was"
