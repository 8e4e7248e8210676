"""What a run hands in, from its own files."""

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import SETTINGS, make_dataset, rows

from lm import bundle, cli
from lm.prepare import SOURCES
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


def test_a_run_gone_on_with_hands_in_its_last_settings(
    handed_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (handed_in / "README.md").read_text()
    assert "All settings are in config.yaml. Beyond" in page and "falls in a straight line" not in page
    shutil.copytree(handed_in.parents[3], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    config["model"]["schedule"]["shape"] = "trapezoid"
    (RUN / "config-resumed-20300101-000000.yaml").write_text(yaml.safe_dump(config))
    folder = bundle.write_bundle(RUN, Path(config["data"]["directory"]), "cpu")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    page = (folder / "README.md").read_text()
    assert "went on with other settings" in page and "falls in a straight line" in page


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


OURS = {"data.corpus": "owt", "data.directory": "data/owt", "data.context_length": 512, "data.train_text": None}
H100 = "NVIDIA H100 80GB HBM3"


def deviations(device: str, world_size: int = 1, train_sha256: str | None = None, **changes: Any) -> list[str]:
    """Those of a run of 90 minutes on OpenWebText, or on another training text."""
    hashes = {split: source.text_sha256 for split, source in SOURCES["owt"].items()}
    hashes["train"] = train_sha256 or hashes["train"]
    meta = {
        "vocab_size": 32_000,
        "splits": {split: {"num_tokens": 100, "text_sha256": text} for split, text in hashes.items()},
    }
    summary: dict[str, Any] = {"settings": {"world_size": world_size}, "steps": 1, "tokens": 1, "parameters": 1}
    summary |= {"val_loss": 3.0, "validation": {}, "used_seconds": 5390.0, "budget_seconds": 5400.0}
    run = Run("x", Path("x"), OURS | changes, [], summary)
    return bundle.describe_result(run, meta, {"device": device})["deviations"]


def test_a_run_by_the_rules_deviates_in_nothing() -> None:
    assert deviations(H100) == []
    assert deviations(H100, **{"data.context_length": 1024, "data.val_context_length": 512}) == []


def test_the_minutes_are_those_of_the_device() -> None:
    assert deviations("NVIDIA B200") == ["more than 45 minutes"]
    assert deviations("cpu") == ["the device is cpu, not one of H100, B200"]


def test_several_devices_are_named_beside_everything_else() -> None:
    assert deviations(H100, world_size=16) == ["16 devices, not one"]
    assert deviations("NVIDIA B200", world_size=2) == ["2 devices, not one", "more than 45 minutes"]
    assert len(deviations("cpu", world_size=2)) == 2


def test_openwebtext_is_told_by_its_hashes_not_by_the_name_of_a_folder() -> None:
    assert deviations(H100, **{"data.corpus": "builtin", "data.directory": "elsewhere/owt"}) == []
    assert deviations(H100, train_sha256="0", **{"data.directory": "my/own/tokens"}) == [
        "the data is my/own/tokens, not OpenWebText"
    ]
    assert deviations(H100, train_sha256="0", **{"data.train_text": "my.txt"}) == [
        "the data is my.txt, not OpenWebText"
    ]


def test_a_run_without_a_cap_deviates(monkeypatch: pytest.MonkeyPatch) -> None:
    summary: dict[str, Any] = {"settings": {"world_size": 1}, "steps": 1, "tokens": 1, "parameters": 1}
    summary |= {"val_loss": 3.0, "validation": {}, "used_seconds": 9999.0, "budget_seconds": None}
    splits = {name: {"num_tokens": 100, "text_sha256": source.text_sha256} for name, source in SOURCES["owt"].items()}
    meta = {"vocab_size": 32_000, "splits": splits}
    result = bundle.describe_result(Run("x", Path("x"), OURS, [], summary), meta, {"device": H100})
    assert result["deviations"] == ["more than 90 minutes"]
