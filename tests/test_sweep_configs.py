"""Every file in configs/sweeps/ can be planned at every scale, and what it plans goes through the real command line."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.cli import CLI, ParseOnly
from lm.control import Signals
from lm.defaults import default_configs
from lm.problems import find_problems
from lm.sweep import PlannedRun, plan

SWEEPS = Path(__file__).parents[1] / "configs" / "sweeps"
ALL = yaml.safe_load((SWEEPS / "all.yaml").read_text())["include"]
BOARD = (
    "leaderboard_rates.yaml",
    "leaderboard.yaml",
    "leaderboard_windows.yaml",
    "leaderboard_depth.yaml",
    "leaderboard_width.yaml",
    "leaderboard_width_rates.yaml",
    "leaderboard_vocab_rates.yaml",
    "leaderboard_vocab.yaml",
)  # no study of the course, and hours of a GPU
ON_CPU = BOARD[3:]  # what leaderboard.yaml shows on a GPU anyway
SCALES, CPU_ONLY = ("cpu", "gpu"), ("cpu",)
STUDIES = [(name, scale) for name in ALL for scale in SCALES]


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CLI]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cli"))
        patch.setattr("sys.argv", ["lm", "fit"])
        yield ParseOnly(time.monotonic(), Signals(), default_configs(["fit"]))


def parse(cli: CLI, run: PlannedRun) -> Any:
    arguments = run.arguments("logs")
    config = cli.parser.parse_args(arguments[2:]).fit
    assert find_problems(config, "fit") == []
    return config


def variants(runs: list[PlannedRun]) -> list[PlannedRun]:
    """One run of each: those of the first seed."""
    return [run for run in runs if dict(run.settings)["seed_everything"] == 0]


def test_all_names_every_study() -> None:
    assert sorted([*ALL, *BOARD, "all.yaml"]) == sorted(path.name for path in SWEEPS.glob("*.yaml"))


@pytest.mark.parametrize("name", [*ALL, *BOARD])
def test_a_study_opens_with_its_question_and_its_commands(name: str) -> None:
    text = (SWEEPS / name).read_text()
    head = text[: text.index("\nstudy: ")]
    sweep = yaml.safe_load(text)
    assert "?" in head.split("\n#\n")[0]
    assert f" python -m lm sweep configs/sweeps/{name} --scale " in head
    assert f"#   python -m lm report {sweep['study']} --logs logs_cpu\n" in head + "\n"
    assert sweep["study"] == Path(name).stem
    assert len(sweep["seeds"]) == (1 if name.endswith("_rates.yaml") else 6 if name.endswith("_windows.yaml") else 3)
    assert tuple(sweep["scales"]) == (CPU_ONLY if name in ON_CPU else SCALES)


@pytest.mark.parametrize(("name", "scale"), STUDIES)
def test_every_variant_parses_and_follows_its_steps(
    name: str, scale: str, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.problems.device_problems", lambda trainer: [])  # a GPU's precision where there is no GPU
    runs = plan(SWEEPS / name, scale)
    assert len({run.name for run in runs}) == len(runs)
    parsed = []
    for run in variants(runs)[:: 1 if len(runs) < 20 else 7]:
        config = parse(cli, run)
        assert config.model.schedule.follow == "steps"
        assert config.run.max_minutes is None
        assert config.run.validate_every_n_steps <= config.trainer.max_steps
        assert (config.trainer.accelerator == "cpu") == (scale == "cpu")
        assert config.run.logs == f"logs/{Path(name).stem}"
        parsed.append(config)
    different = {repr((config.model, config.data, config.trainer.max_steps)) for config in parsed}
    assert len(different) == len(parsed), "two variants that are the same run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in BOARD for scale in (CPU_ONLY if name in ON_CPU else SCALES)]
)
def test_every_run_for_the_leaderboard_has_the_same_time(
    name: str, scale: str, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock on a GPU, by the number of its steps and their cost on a CPU."""
    monkeypatch.setattr("lm.problems.device_problems", lambda trainer: [])
    parsed = [parse(cli, run) for run in variants(plan(SWEEPS / name, scale))]
    for config in parsed:
        minutes = 5 if "half_time" in config.run.name else 10
        by_clock = (config.model.schedule.follow, config.run.max_minutes) == ("clock", minutes)
        assert by_clock == (scale == "gpu")
        assert (config.trainer.max_steps > 0) == (scale == "cpu")
    different = {repr((c.model, c.data, c.trainer.max_steps, c.run.max_minutes)) for c in parsed}
    assert len(different) == len(parsed)


@pytest.mark.parametrize(("scale", "num_tokens"), [("cpu", 819_200), ("gpu", 40_960_000)])
def test_batch_sizes_see_the_same_tokens(
    scale: str, num_tokens: int, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.problems.device_problems", lambda trainer: [])
    configs = [parse(cli, run) for run in plan(SWEEPS / "batch_size.yaml", scale)[::9]]
    tokens = {c.data.batch_size * c.trainer.max_steps * c.data.context_length for c in configs}
    assert max(tokens) == num_tokens
    assert min(tokens) > 0.95 * num_tokens


@pytest.mark.parametrize("scale", SCALES)
def test_feed_forward_layers_have_as_many_parameters(scale: str, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.problems.device_problems", lambda trainer: [])
    swiglu, silu = (parse(cli, run).model.transformer for run in variants(plan(SWEEPS / "swiglu_ablation.yaml", scale)))
    assert (swiglu.ffn, silu.ffn) == ("swiglu", "silu")
    assert 2 * silu.d_ff == pytest.approx(3 * swiglu.d_ff, rel=0.02)
