"""lm.bench: the rivals compute what we compute, and a small benchmark runs to its page."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lm import bench
from lm.accounting import config_from_yaml
from lm.bench import BuiltinLM, Setting
from lm.functional import cross_entropy
from lm.model import TransformerConfig, TransformerLM

TINY = TransformerConfig(vocab_size=60, context_length=16, num_layers=2, num_heads=2, d_model=16, d_ff=32)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_builtin_rival_is_the_same_function(head: str) -> None:
    torch.manual_seed(0)
    ours = TransformerLM(dataclasses.replace(TINY, head=head))
    builtin = BuiltinLM.from_ours(ours)
    assert sum(p.numel() for p in builtin.parameters()) == sum(p.numel() for p in ours.parameters())
    token_ids, targets = torch.randint(60, (2, 3, 16))
    torch.testing.assert_close(builtin(token_ids), ours(token_ids), rtol=1e-4, atol=1e-5)
    theirs = F.cross_entropy(builtin(token_ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(theirs, cross_entropy(ours(token_ids), targets), rtol=1e-5, atol=1e-6)


def test_demo_is_the_built_in_run() -> None:
    assert config_from_yaml(Path(__file__).parents[1] / "configs" / "builtin.yaml") == bench.DEMO


def test_peak_memory_sees_what_is_freed_again() -> None:
    def step() -> None:
        a = torch.zeros(1_000_000)
        b = a + 1
        del a, b
        torch.zeros(500_000)

    assert bench.peak_memory(step, torch.device("cpu")) == pytest.approx(8_000_000, rel=0.01)


def test_requests_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="demo, base"):
        bench.run(suite="cpu", only="nonsense", device="cpu")
    with pytest.raises(ValueError, match="suite=gpu needs a CUDA device"):
        bench.run(suite="gpu", device="cpu")


def test_a_part_that_fails_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    kept = []

    def fail(setting: Setting, *args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    def measure(setting: Setting, *args: object, rounds: int) -> dict[str, object]:
        kept.append(len(json.loads(path.read_text())["failures"]))  # on disk before the next part begins
        return {"name": setting.name, "new_tokens": 1, "results": {}}

    monkeypatch.setitem(bench.SUITES, "cpu", [Setting("a", TINY, 4), Setting("b", TINY, 4)])
    monkeypatch.setattr(bench, "matmul_flops", lambda device, precision: 1e11)
    monkeypatch.setattr(bench, "compare_training", fail)
    monkeypatch.setattr(bench, "compare_generation", measure)
    bench.run(suite="cpu", device="cpu", json_path=path)
    result = json.loads(path.read_text())
    assert kept == [2, 2]
    assert [part["name"] for part in result["generation"]] == ["a", "b"]
    lost = {"kind": "training", "name": "a", "error": "OutOfMemoryError: CUDA out of memory"}
    assert result["failures"] == [lost, lost | {"name": "b"}]
    assert "Not measured: training a: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    monkeypatch.setattr(bench, "compare_generation", lambda setting, *args, rounds: fail(setting))
    with pytest.raises(ValueError, match="nothing could be measured"):
        bench.run(suite="cpu", device="cpu")


@pytest.mark.slow
def test_whole_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench.SUITES, "cpu", [Setting("tiny", TINY, 4, steps=2, rounds=3)])
    monkeypatch.setattr(bench, "matmul_flops", lambda device, precision: 1e11)
    bench.run(suite="cpu", device="cpu", json_path=tmp_path / "result.json", markdown_path=tmp_path / "result.md")
    result = json.loads((tmp_path / "result.json").read_text())
    (training,) = result["training"]
    assert {"ours", "lightning", "builtin"} <= training["entrants"].keys()
    for entrant in training["entrants"].values():
        speed = entrant["tokens_per_second"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    assert training["entrants"]["builtin"]["speed_relative_to_builtin"] == {"median": 1, "low": 1, "high": 1}
    assert training["entrants"]["ours"]["parts_seconds"].keys() == {"data", "forward", "backward", "clip and optimizer"}
    page = (tmp_path / "result.md").read_text()
    assert page == capsys.readouterr().out.removesuffix("\n")
    assert "### Training: tiny" in page
    assert "Lightning's loop, logging included, costs" in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_suite_runs_compiled() -> None:
    setting = Setting("tiny", TINY, 4, "bf16-mixed", compile=True, steps=2, rounds=2)
    result = bench.compare_training(setting, torch.device("cuda"), ["builtin"], matmul=1e14)
    assert result["entrants"]["ours"]["peak_memory_bytes"] > 0
