"""A run that is stopped and goes on ends with every bit that the unbroken run ends with."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import SETTINGS, make_dataset, rows

from lm import cli
from lm.control import RunControl
from lm.module import LanguageModel

LENGTH = ["--trainer.max_steps=4", "--run.validate_every_n_steps=2", "--run.keep_checkpoints=99"]

# What two equal runs need not share: the clock (a logged line has it), and Python's generator, from which the type
# checks of the test run draw.
IGNORED = {"seconds", "training_began", "validation_seconds", "save_seconds", "num_bytes", "python"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


class Runs:
    """Runs `python -m lm fit` in this process, whole or cut into pieces by signals."""

    def __init__(self, folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.dataset, self.monkeypatch = folder, dataset, monkeypatch
        self.batches: list[list[int]] = []  # the first token of each window of each batch that the model has seen

    def fit(self, name: str, *arguments: str, stop: Callable[[str, int], bool] = lambda phase, count: False) -> int:
        """One process; a SIGTERM comes where `stop(phase, how often the phase came in this process)` says so."""
        counts: dict[str, int] = {}

        def here(phase: str) -> None:
            counts[phase] = counts.get(phase, 0) + 1
            if stop(phase, counts[phase]):
                signal.raise_signal(signal.SIGTERM)

        def spy(owner: type, name: str, phase: str) -> Any:
            original = getattr(owner, name)

            def method(self_: Any, *args: Any) -> Any:
                if phase == "batch":
                    self.batches.append(args[0][0][:, 0].tolist())
                if not (phase == "validation" and self_.trainer.sanity_checking):
                    here(phase)
                return original(self_, *args)

            patch.setattr(owner, name, method)

        with self.monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["lm"])
            spy(LanguageModel, "training_step", "batch")
            spy(LanguageModel, "validation_step", "validation")
            spy(RunControl, "save", "save")
            return cli.main(
                [
                    "fit",
                    f"--data.directory={self.dataset}",
                    *SETTINGS,
                    *LENGTH,
                    f"--run.logs={self.folder / name}",
                    *arguments,
                ],
                time.monotonic(),
            )

    def directory(self, name: str) -> Path:
        return self.folder / name / "toy" / "version_0"

    def last(self, name: str) -> dict[str, Any]:
        """The last checkpoint of a run."""
        return torch.load(max(self.directory(name).glob("checkpoints/*.ckpt")), weights_only=True)


@pytest.fixture
def runs(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, dataset, monkeypatch)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ in a bit, but for what the clock says."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(a.keys() ^ b.keys(), key=str)}"]
        return [line for key in a if key not in IGNORED for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same and type(a) is type(b) else [f"{path}: {a} and {b}"]


def measured(run: Path) -> dict[str, Any]:
    """The validation figures of each checkpoint that was kept for them."""
    records = {path.stem: json.loads(path.read_text())["metrics"] for path in run.glob("checkpoints/*.json")}
    return {name: metrics for name, metrics in records.items() if metrics}


def assert_equal(runs: Runs, cut: str, whole: str) -> None:
    """Losses, norms, rates, validation: every logged row; weights, moments, counters, random numbers: every bit."""
    assert rows(runs.directory(cut)) == rows(runs.directory(whole))
    assert differences(runs.last(cut), runs.last(whole)) == []
    assert measured(runs.directory(cut)) == measured(runs.directory(whole))


def go_on(runs: Runs, name: str, *arguments: str, stop: Callable[[str, int], bool]) -> int:
    """Run and resume until the end; the number of times that a signal stopped it."""
    for stops in range(200):
        code = runs.fit(name, "--resume=auto", *arguments, stop=stop)
        if code == 0:
            return stops
        assert code == 143
    raise AssertionError("the run makes no progress")


def after(phase: str, count: int) -> Callable[[str, int], bool]:
    """Stop at the `count`-th time that a phase comes in a process."""
    return lambda now, times: now == phase and times == count


VARIANTS = {
    "plain": [],
    "accumulation": ["--trainer.accumulate_grad_batches=3"],
    "workers": ["--data.num_workers=2"],
    "epochs": ["--data.windows=epoch", "--data.batch_size=32"],  # an epoch has 217 windows
    "device": ["--data.tokens_on=device"],
    "leaderboard": [
        "--model.optimizer.matrices=muon",
        "--model.optimizer.embedding_lr=0.01",
        "--model.transformer.qk_norm=true",
        "--model.transformer.value_embeddings=true",
        "--model.schedule.context_lengths={0: 8, 50: 16}",
    ],
}


@pytest.mark.parametrize("variant", ["accumulation", pytest.param("leaderboard", marks=pytest.mark.slow)])
def test_a_run_stopped_in_every_single_step_equals_the_unbroken_one(runs: Runs, variant: str) -> None:
    assert runs.fit("whole", *VARIANTS[variant]) == 0
    seen, runs.batches = runs.batches, []
    per_update = 3 if variant == "accumulation" else 1
    assert go_on(runs, "cut", *VARIANTS[variant], stop=after("batch", 1)) == 4
    assert runs.batches == seen
    assert len(seen) == 4 * per_update
    assert_equal(runs, "cut", "whole")


def test_a_run_stopped_in_its_validations_does_them_again_from_the_start(runs: Runs) -> None:
    small = ["--data.val_batch_size=2"]  # 11 batches
    assert runs.fit("whole", *small) == 0
    once = {"step": 0}

    def stop(phase: str, count: int) -> bool:  # in the first process in the first validation, and so on
        if phase == "validation" and count == 5 and once["step"] < 2:
            once["step"] += 1
            return True
        return False

    assert go_on(runs, "cut", *small, stop=stop) == 2
    assert_equal(runs, "cut", "whole")


@pytest.mark.slow
def test_a_signal_during_a_save_changes_nothing(runs: Runs) -> None:
    assert runs.fit("whole") == 0
    assert go_on(runs, "cut", "--run.checkpoint_every_n_steps=1", stop=after("save", 1)) > 1
    assert_equal(runs, "cut", "whole")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(runs: Runs) -> None:
    for name in ("a", "b"):
        assert runs.fit(name) == 0
    assert_equal(runs, "a", "b")
    runs.batches = []
    assert runs.fit("c", "--seed_everything=1") == 0
    assert rows(runs.directory("c")) != rows(runs.directory("a"))
    batches, runs.batches = runs.batches, []
    assert runs.fit("d", "--seed_everything=2", "--data.seed=1") == 0
    assert runs.batches == batches  # the same windows for another beginning


@pytest.mark.slow
def test_the_number_of_threads_hardly_matters(runs: Runs) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert runs.fit(str(threads)) == 0
    finally:
        torch.set_num_threads(before)
    for one, two in zip(rows(runs.directory("1")), rows(runs.directory("2")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_after_any_number_of_batches_equals_the_unbroken_one(runs: Runs, variant: str) -> None:
    num_steps, every = {"plain": (12, 1), "accumulation": (6, 1)}.get(variant, (24, 8))
    arguments = [*VARIANTS[variant], f"--trainer.max_steps={num_steps}", "--run.validate_every_n_steps=5"]
    assert runs.fit("whole", *arguments) == 0
    for count in range(1, len(runs.batches) + 1, every):
        name = f"cut-{count}"
        assert runs.fit(name, *arguments, stop=after("batch", count)) == 143
        assert runs.fit(name, "--resume=must", *arguments) == 0
        assert_equal(runs, name, "whole")
