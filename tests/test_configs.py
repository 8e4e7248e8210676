"""Every file in configs/ goes through the real command line; bases are complete, overrides are small."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.accounting import FIT_KEYS, config_from_yaml, read_settings
from lm.cli import CLI, ParseOnly
from lm.control import Signals
from lm.defaults import default_configs
from lm.model import TransformerConfig
from lm.problems import find_problems

ROOT = Path(__file__).parents[1]
LEADERBOARD = ROOT / "configs" / "leaderboard.yaml"
BASES = sorted(path for path in ROOT.glob("configs/*.yaml") if path != LEADERBOARD)
ABLATIONS = sorted(ROOT.glob("configs/ablations/*.yaml"))


def make_cli(monkeypatch: pytest.MonkeyPatch) -> CLI:
    monkeypatch.setattr("sys.argv", ["lm", "fit"])
    return ParseOnly(time.monotonic(), Signals(), default_configs(["fit"]))


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CLI]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cli"))
        yield make_cli(patch)


def parse(cli: CLI, *arguments: str) -> Any:
    config = cli.parser.parse_args(["fit", *arguments]).fit
    assert find_problems(config, "fit") == []
    return config


def leaves(settings: dict[str, Any], prefix: str = "") -> set[str]:
    names = set()
    for key, value in settings.items():
        names |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return names


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_every_base_parses_and_says_how_it_is_run(path: Path, cli: CLI) -> None:
    config = parse(cli, "--config", str(path))
    assert config.data.corpus == ("builtin" if path.stem == "own_text" else path.stem.split("_")[0])
    head = path.read_text().split("\n\n")[0]
    command = "python -m lm fit" if path.stem == "builtin" else f"python -m lm fit --config configs/{path.name}"
    assert f"#   {command}" in head
    assert "# Expected: " in head
    assert "Wall-clock" in head or "max_minutes" in head


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_nothing_of_the_builtin_corpus_leaks_into_another_base(path: Path) -> None:
    below = leaves(yaml.safe_load((ROOT / "configs/builtin.yaml").read_text()))
    if path.stem == "own_text":
        below -= {"data.corpus", "trainer.log_every_n_steps"}
    assert below - leaves(yaml.safe_load(path.read_text())) == set()


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_opens_with_its_question_and_changes_a_base(path: Path, cli: CLI) -> None:
    base = str(ROOT / "configs/tinystories.yaml")
    plain, changed = parse(cli, "--config", base), parse(cli, "--config", base, "--config", str(path))
    own = leaves(yaml.safe_load(path.read_text()))
    differing = {name for name in own if changed[name] != plain[name]}
    assert differing == own, "a setting that changes nothing"
    assert "?" in path.read_text()
    assert len(own) <= 5


@pytest.mark.parametrize("minutes", [90, 45])
def test_the_leaderboard_is_a_base_with_a_cap(minutes: int, cli: CLI) -> None:
    files = ("--config", str(ROOT / "configs/owt.yaml"), "--config", str(LEADERBOARD))
    config = parse(cli, *files, *(() if minutes == 90 else ("--run.max_minutes", str(minutes))))
    assert (config.run.max_minutes, config.run.bundle) == (minutes, "leaderboard")
    assert (config.model.schedule.follow, config.trainer.max_steps) == ("clock", -1)
    assert (config.data.val_context_length or config.data.context_length) == 512
    assert (config.data.corpus, config.data.windows, config.data.tokens_on) == ("owt", "epoch", "device")
    head = LEADERBOARD.read_text().split("\ndata:")[0]
    assert "#   python -m lm fit --config configs/owt.yaml --config configs/leaderboard.yaml\n" in head
    assert "Expected: " in head


def test_accounting_knows_the_keys_of_a_configuration(cli: CLI) -> None:
    assert parse(cli).as_dict().keys() - {"config", "__default_config__"} == FIT_KEYS


@pytest.mark.parametrize("names", [["owt"], ["owt", "leaderboard"], ["tinystories", "ablations/silu"]])
def test_a_models_cost_is_reckoned_from_the_files_that_it_is_trained_with(names: list[str], cli: CLI) -> None:
    paths = [ROOT / f"configs/{name}.yaml" for name in names]
    config = parse(cli, *(word for path in paths for word in ("--config", str(path))))
    trained = TransformerConfig(**config.model.transformer.as_dict() | {"vocab_size": config.data.vocab_size})
    assert config_from_yaml(*paths) == trained


def test_files_merge_in_order_and_the_command_line_comes_last(cli: CLI, tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: {optimizer: {lr: 0.5, eps: 0.1}}\ntrainer: {max_steps: 777}\n")
    two.write_text("model: {optimizer: {lr: 0.25, weight_decay: 0.0}}\n")
    config = parse(cli, "--config", str(one), "--config", str(two), "--model.optimizer.weight_decay", "0.125")
    optimizer = config.model.optimizer
    assert (optimizer.lr, optimizer.eps, optimizer.weight_decay, config.trainer.max_steps) == (0.25, 0.1, 0.125, 777)
    assert config.model.transformer.d_model == 128, "configs/builtin.yaml lies below"


def test_a_file_may_be_empty_and_give_anew_what_it_merges(cli: CLI, tmp_path: Path) -> None:
    empty, merging = tmp_path / "empty.yaml", tmp_path / "merging.yaml"
    empty.write_text("# trainer: {max_steps: 777}\n")
    assert parse(cli, "--config", str(empty)).trainer == parse(cli).trainer
    merging.write_text("data: &same {seed: 1, batch_size: 2}\n<<: {data: {<<: *same, batch_size: 3, <<: *same}}\n")
    assert read_settings(merging) == {"data": {"seed": 1, "batch_size": 2}}
    merging.write_text("seed_everything: &seed 7\ndata: {seed: *seed, <<: {seed: 3, batch_size: 3}}\n")
    assert parse(cli, "--config", str(merging)).data.seed == 7


def test_the_codes_own_defaults_are_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm.defaults.default_config", lambda: tmp_path / "absent.yaml")
    config = parse(make_cli(monkeypatch))
    assert config.data.corpus == "builtin"
    assert config.trainer.max_steps == 1000


def test_validation_counts_updates_whatever_the_accumulation(cli: CLI) -> None:
    config = parse(cli, "--run.validate_every_n_steps=50", "--trainer.accumulate_grad_batches=4")
    assert config.trainer.val_check_interval == 200
