"""What a run hands in, from its own files."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import SETTINGS, make_dataset, rows

from lm import bundle, cli
from lm.report import Run

RUN = Path("logs/toy/version_0")
OPTIONS = [
    "--model.transformer.qk_norm=true",
    "--model.transformer.value_embeddings=true",
    "--model.optimizer.matrices=muon",
    "--model.schedule.context_lengths={0: 8}",
]


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the toy corpus."""
    folder = tmp_path_factory.mktemp("run")
    data = make_dataset(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lm"])
        arguments = ["fit", f"--data.directory={data}", *SETTINGS, *OPTIONS, "--run.bundle=leaderboard"]
        assert cli.main(arguments, time.monotonic()) == 0
    return folder / RUN / "bundle"


def test_the_figures_are_those_of_the_run(handed_in: Path) -> None:
    result = json.loads((handed_in / "result.json").read_text())
    summary = json.loads((handed_in.parent / "summary.json").read_text())
    assert result["val_loss"] == summary["val_loss"]
    assert (result["steps"], result["tokens"]) == (8, 8 * 64)
    assert result["val_context_length"] == 16
    with open(handed_in / "learning_curve.csv") as file:
        curve = list(csv.DictReader(file))
    logged = rows(handed_in.parent)
    assert [float(row["val/loss"]) for row in curve if row["val/loss"]] == [
        row["val/loss"] for row in logged if "val/loss" in row
    ]
    assert all(float(row["wall_seconds"]) > 0 for row in curve)
    config = yaml.safe_load((handed_in / "config.yaml").read_text())
    assert config["model"]["optimizer"]["matrices"] == "muon"
    assert json.loads((handed_in / "environment.json").read_text())["torch"]


def test_the_page_says_what_it_is_and_what_it_is_not(handed_in: Path) -> None:
    page = (handed_in / "README.md").read_text()
    result = json.loads((handed_in / "result.json").read_text())
    assert f"{result['val_loss']:.4f} nats per token" in page
    assert "Measured under the leaderboard's limits, but as a rehearsal" in page
    for reason in ("not OpenWebText", "the vocabulary has 257 tokens", "context is 16, not 512", "the device is"):
        assert reason in page
    recipe = page.split("## Recipe")[1].split("## Samples")[0]
    assert recipe.count("\n- ") == 5, "the four options, and the tied head of the built-in base"
    assert "8} (percentage of the run: tokens)" in recipe
    samples = page.split("## Samples")[1]
    assert samples.count("**model**") == samples.count("**text goes on**") == 4
    assert "cat" in samples


def run_with(world_size: int = 1, **changes: Any) -> Run:
    settings = {"data.corpus": "owt", "data.context_length": 512, "data.train_text": None} | changes
    summary: dict[str, Any] = {"settings": {"world_size": world_size}}
    summary |= {"val_loss": 3.0, "validation": {}, "used_seconds": 5390.0, "budget_seconds": 5400.0}
    return Run("x", Path("x"), settings, [], summary | {"steps": 1, "tokens": 1, "parameters": 1})


@pytest.mark.parametrize(
    ("changes", "device", "deviations"),
    [
        ({}, "NVIDIA H100 80GB HBM3", []),
        ({}, "NVIDIA B200", ["more than 45 minutes"]),
        ({"data.context_length": 1024, "data.val_context_length": 512}, "NVIDIA H100 80GB HBM3", []),
        ({"data.train_text": "my.txt"}, "NVIDIA H100 PCIe", ["the data is my.txt, not OpenWebText"]),
        ({"data.directory": "my/tokens"}, "NVIDIA H100", ["the data is my/tokens, not OpenWebText"]),
        ({"world_size": 16}, "NVIDIA H100 80GB HBM3", ["16 devices, not one"]),
    ],
)
def test_what_differs_from_the_rules_is_named(changes: dict[str, Any], device: str, deviations: list[str]) -> None:
    meta = {"vocab_size": 32_000, "splits": {"valid": {"num_tokens": 100}}}
    assert bundle.describe_result(run_with(**changes), meta, {"device": device})["deviations"] == deviations
