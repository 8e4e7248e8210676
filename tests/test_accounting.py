"""lm.accounting against the real model, torch's FLOP counter, measured memory, and the handout's figures."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lm import accounting
from lm.accounting import named_config
from lm.device import peak_memory
from lm.functional import cross_entropy
from lm.model import TransformerConfig, TransformerLM
from lm.optim import AdamW, clip_gradients

SMALL = TransformerConfig(vocab_size=300, context_length=32, num_layers=3, num_heads=4, d_model=48, d_ff=128)
VARIANTS = [
    dataclasses.replace(SMALL, norm=norm, ffn=ffn, head=head)
    for norm, ffn, head in itertools.product(("pre", "post", "none"), ("swiglu", "silu"), ("untied", "tied"))
]


OPTIONS = [
    dataclasses.replace(SMALL, ffn="relu2", d_ff=192),
    dataclasses.replace(SMALL, qk_norm=True, gated_attention=True),
    dataclasses.replace(SMALL, value_embeddings=True, head="tied"),
]


@pytest.mark.parametrize("config", VARIANTS + OPTIONS, ids=lambda c: f"{c.norm}-{c.ffn}-{c.head}")
def test_parameters_and_flops_equal_the_models(config: TransformerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's counter and with the formulas that the compiler sees: the eager functions skip masked scores."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = TransformerLM(config, device="meta")
    assert accounting.num_parameters(config) == sum(p.numel() for p in model.parameters())
    token_ids = torch.zeros(5, config.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = model(token_ids)
    assert accounting.forward_flops(config, batch_size=5) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        cross_entropy(logits, token_ids).backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert accounting.flops_per_token(config) * token_ids.numel() == both


@pytest.mark.parametrize(
    ("rules", "num_parameters", "flops"), [("2025", 2_127_057_600, 4.513e12), ("2026", 1_640_452_800, 3.517e12)]
)
def test_gpt2_xl_of_the_handout(rules: accounting.Rules, num_parameters: int, flops: float) -> None:
    config = named_config("gpt2-xl", rules)
    assert accounting.num_parameters(config) == num_parameters
    assert accounting.forward_flops(config) == pytest.approx(flops, rel=2e-4)


def test_attention_dominates_at_a_long_context() -> None:
    def share(context_length: int) -> float:
        config = dataclasses.replace(named_config("gpt2-xl", "2025"), context_length=context_length)
        products = accounting.matrix_products(config)
        return sum(p.flops for p in products if "d/h" in p.shapes) / sum(p.flops for p in products)

    assert share(1024) < 0.2 < 0.5 < share(16_384)


def test_handouts_time_on_one_a100() -> None:
    """400,000 steps of 1024 sequences at half of an A100's float32 peak: 18 years (adamw_accounting, 2025)."""
    peak = accounting.peak_flops("NVIDIA A100-SXM4-80GB", "float32")
    assert peak == 19.5e12
    seconds = accounting.training_seconds(named_config("gpt2-xl", "2025"), 400_000 * 1024 * 1024, peak, mfu=0.5)
    assert seconds / 86_400 == pytest.approx(3 * 4.513e12 * 1024 * 400_000 / (0.5 * 19.5e12) / 86_400, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA RTX 9999", "float32", None),
        ("AMD A10-7850K Radeon R7, 12 Compute Cores 4C+8G", "float32", None),
        ("", "float32", None),
    ],
)
def test_peak_of_devices(name: str, dtype: accounting.Dtype, tflops: float | None) -> None:
    assert accounting.peak_flops(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_largest_batch_is_the_last_that_fits() -> None:
    config = named_config("gpt2-xl", "2025")
    largest = accounting.largest_batch(config, 80e9)
    assert largest > 0
    assert accounting.training_memory_bytes(config, largest) <= 80e9
    assert accounting.training_memory_bytes(config, largest + 1) > 80e9
    assert accounting.largest_batch(config, 1e9) == 0


def test_bad_names_and_shares() -> None:
    with pytest.raises(ValueError, match=r"gpt3.*gpt2-small.*owt"):
        named_config("gpt3")
    with pytest.raises(ValueError, match="mfu=0"):
        accounting.training_seconds(SMALL, 1e6, 1e12, mfu=0)


# -------------------------------------------------------------------------------------------------------- the memory

MEMORY = TransformerConfig(vocab_size=1000, context_length=128, num_layers=4, num_heads=4, d_model=64, d_ff=192)


@pytest.mark.parametrize(
    ("changes", "batch_size", "precision"),
    [
        ({}, 8, "32-true"),
        ({}, 8, "bf16-mixed"),
        pytest.param({}, 8, "bf16-true", marks=pytest.mark.slow),
        ({"vocab_size": 8000}, 8, "32-true"),
        pytest.param({"vocab_size": 8000}, 8, "bf16-mixed", marks=pytest.mark.slow),
        ({"context_length": 512}, 3, "32-true"),
        pytest.param({"context_length": 512}, 3, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param({"num_layers": 12, "vocab_size": 200}, 4, "32-true", marks=pytest.mark.slow),
        pytest.param(
            {"num_layers": 12, "vocab_size": 200, "activation_checkpointing": True},
            8,
            "32-true",
            marks=pytest.mark.slow,
        ),
        pytest.param({"activation_checkpointing": True}, 8, "bf16-mixed", marks=pytest.mark.slow),
        ({"d_model": 256, "d_ff": 704, "num_heads": 8}, 1, "32-true"),  # parameters outweigh activations
        ({"ffn": "silu", "d_ff": 512}, 8, "32-true"),
        pytest.param({"head": "tied", "norm": "post"}, 8, "32-true", marks=pytest.mark.slow),
        pytest.param({"norm": "none", "position": "none"}, 8, "32-true", marks=pytest.mark.slow),
        pytest.param({"attention": "fused"}, 8, "32-true", marks=pytest.mark.slow),
        pytest.param({"attention": "fused"}, 8, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param({"qk_norm": True, "gated_attention": True}, 8, "32-true", marks=pytest.mark.slow),
        pytest.param({"qk_norm": True, "gated_attention": True}, 8, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param({"ffn": "relu2", "d_ff": 256}, 8, "32-true", marks=pytest.mark.slow),
        pytest.param({"ffn": "relu2", "d_ff": 256}, 8, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param({"value_embeddings": True}, 8, "32-true", marks=pytest.mark.slow),
        pytest.param({"value_embeddings": True}, 8, "bf16-mixed", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_memory_is_within_ten_percent(changes: dict, batch_size: int, precision: accounting.Precision) -> None:
    config = dataclasses.replace(MEMORY, **changes)
    model = TransformerLM(config, dtype=torch.bfloat16 if precision == "bf16-true" else None)
    optimizer = AdamW(model.parameters())
    token_ids = torch.randint(config.vocab_size, (batch_size, config.context_length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(token_ids, targets=token_ids)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # the moments come into being
    resident = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    measured = resident + peak_memory(step, torch.device("cpu"))
    assert accounting.training_memory_bytes(config, batch_size, precision=precision) == pytest.approx(measured, rel=0.1)


# ---------------------------------------------------------------------------------------------------------- the page


def test_page_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    accounting.run("gpt2-xl", rules="2025", context_length=16_384, device="A100", json=True)
    page = json.loads(capsys.readouterr().out)["gpt2-xl"]
    assert page["num_parameters"] == 2_127_057_600
    assert page["config"]["context_length"] == 16_384
    assert (
        page["forward_flops"] == sum(p["flops"] for p in page["matrix_products"]) == pytest.approx(1.495e14, rel=1e-3)
    )
    assert sum(p["share"] for p in page["matrix_products"]) == pytest.approx(1)
    assert page["peak_flops"] == 19.5e12
    accounting.run("gpt2-xl", rules="2025", context_length=16_384, attention="fused", json=True)
    fused = json.loads(capsys.readouterr().out)["gpt2-xl"]
    assert fused["memory_bytes"] < 0.1 * page["memory_bytes"]


def test_memory_does_not_depend_on_whether_the_peak_is_known() -> None:
    config = named_config("gpt2-medium")
    options: dict[str, Any] = {"dtype": "tf32", "memory_gb": 80, "mfu": 0.5, "num_tokens": 1e9}
    h100, v100, rtx, cpu = (
        accounting.account(config, 8, "32-true", device, **options) for device in ("H100", "V100", "RTX 5080", "cpu")
    )
    assert [page["peak_flops"] is None for page in (h100, v100, rtx)] == [False, True, True]
    assert cpu["memory_bytes"] < h100["memory_bytes"] == v100["memory_bytes"] == rtx["memory_bytes"]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": -8}, {"memory_gb": 0.0}, {"num_tokens": 0.0}, {"context_length": 0}]
)
def test_figures_of_nothing_are_refused(options: dict[str, float | int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
        accounting.run("gpt2-small", **options)  # type: ignore[arg-type]


def test_page_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    accounting.run("gpt2-xl", device="H100")
    out = capsys.readouterr().out
    assert "1,640,452,800" in out
    assert "3.517e+12" in out
    assert "202.21 days" in out
    accounting.run("gpt2-xl", device="abacus")
    assert "the peak of abacus in tf32 is not known" in capsys.readouterr().out
    accounting.run("gpt2", rules="2025")
    assert "gpt2-medium" in capsys.readouterr().out


def test_model_of_configuration_files(tmp_path: Path) -> None:
    """One over the other, as `fit` lays them over the built-in one."""
    builtin = accounting.config_from_yaml()
    assert (builtin.vocab_size, builtin.context_length, builtin.num_layers) == (2048, 256, 3)
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    base.write_text("model: {transformer: {num_layers: 2, norm: post}}\ndata: {corpus: owt, context_length: 128}\n")
    owt = dataclasses.replace(builtin, vocab_size=32_000, context_length=128, num_layers=2, norm="post")
    assert accounting.config_from_yaml(base) == owt
    over.write_text("model: {transformer: {num_layers: 5}}\ndata: {vocab_size: 500}\n")
    assert accounting.config_from_yaml(base, over) == dataclasses.replace(owt, vocab_size=500, num_layers=5)
    over.write_text("data: {train_text: my.txt}\n")
    with pytest.raises(ValueError, match=r"over\.yaml: .* give data\.vocab_size"):
        accounting.config_from_yaml(over)
    over.write_text("model: {transformer: {layers: 2}}\n")
    with pytest.raises(ValueError, match=r"over\.yaml: model\.transformer has no layers"):
        accounting.config_from_yaml(over)
    over.write_text("study: rates\ngrid: {model.optimizer.lr: [1, 2]}\n")
    with pytest.raises(ValueError, match=r"over\.yaml is no configuration of `fit`, which has no grid, study$"):
        accounting.config_from_yaml(over)
    over.write_text("data: {corpus: pile}\n")
    with pytest.raises(ValueError, match=r"data\.corpus='pile' must be one of builtin, "):
        accounting.config_from_yaml(over)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [a\ndata: b", "bad.yaml, line 2: no valid YAML: expected ',' or ']', but got ':'"),
        ("data: {}\ndata: {}", "bad.yaml, line 2: 'data' is given twice (first in line 1)"),
        ("- model", "bad.yaml: a mapping of settings is wanted (`name: value`), not a list"),
        ("model: [1]", "bad.yaml: `model` must be a mapping of settings, not [1]"),
        ("model: {transformer: small}", "bad.yaml: `transformer` must be a mapping of settings, not 'small'"),
    ],
)
def test_a_file_of_no_settings_is_named(content: str, message: str, tmp_path: Path) -> None:
    """In a ValueError, which the command line says in one line."""
    (path := tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        accounting.run(str(path), memory_gb=80.0)
