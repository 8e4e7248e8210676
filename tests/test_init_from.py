"""A run that begins with the weights of another: what it takes over, what it leaves behind, what is refused."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from toy import SETTINGS, make_dataset, rows

from lm import __main__
from lm.checkpoint import AtomicCheckpointIO, best_checkpoint, load_model, newest_checkpoint, read_checkpoint
from lm.cli import what_is_refused
from lm.data import TokenDataModule, read_meta
from lm.defaults import find_beginning
from lm.module import LanguageModel
from tokenizer import Tokenizer

Run = Callable[..., int]
BASE = Path("logs/toy/version_0")
TEXT = "the dog ran to the cat and sat.\n" * 400
STILL = ("--model.optimizer.lr=1e-30", "--model.optimizer.weight_decay=0")  # updates that move nothing
SHORT = ("--trainer.max_steps=3", "--model.schedule.warmup_steps=1")


def run_lm(*arguments: str) -> int:
    """`python -m lm ...` in this process; returns the exit code."""
    try:
        return __main__.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a run on it and a text."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = make_dataset(folder / "data/toy")
    (folder / "my.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lm"])
        assert run_lm("fit", f"--data.directory={dataset}", *SETTINGS, "--model.transformer.norm=post") == 0
    return folder


@pytest.fixture
def lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Run:
    """`run_lm` in a copy of that folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])
    return run_lm


def begin(lm: Run, *arguments: str) -> int:
    return lm("fit", f"--model.init_from={BASE}", "--data.train_text=my.txt", *SHORT, *arguments)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(newest_checkpoint(run))[0].state_dict()


def test_a_run_begins_with_the_weights_of_another(
    lm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    seen: list[list[Path]] = []
    monkeypatch.setattr(StopAfterFour, "on_train_batch_end", lambda *_: seen.append([*scratch.glob("lm-inherited-*")]))
    assert begin(lm, *STILL, "--trainer.callbacks=test_init_from.StopAfterFour") == 0
    assert begin(lm, "--model.transformer.norm=prex") == 2
    assert [*seen, [*scratch.glob("lm-inherited-*")]] == [[]] * 4, "a run that is killed leaves nothing there"
    base, begun = load_model(BASE)[0].state_dict(), weights(Path("logs/my/version_0"))
    assert all(torch.equal(base[name], begun[name]) for name in base)
    assert f"its weights are those of {best_checkpoint(BASE)}" in capfd.readouterr().out


def test_it_counts_from_nothing_and_has_the_settings_of_the_other_but_its_name_and_data(lm: Run) -> None:
    assert begin(lm) == 0
    run = Path("logs/my/version_0")
    assert [row["step"] for row in rows(run) if "lr" in row] == [1, 2, 3]
    config, before = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, BASE))
    assert config["model"]["transformer"] == before["model"]["transformer"]
    assert config["model"]["transformer"]["norm"] == "post"
    assert config["data"]["batch_size"] == before["data"]["batch_size"]
    assert config["model"]["init_from"] == str(best_checkpoint(BASE))
    assert config["data"]["directory"] != before["data"]["directory"]
    assert config["data"]["tokenizer"] == str(BASE / "tokenizer")
    assert json.loads((run / "summary.json").read_text())["settings"]["init_from"] == str(best_checkpoint(BASE))


def test_its_text_is_encoded_with_the_tokenizer_of_the_other(lm: Run) -> None:
    assert begin(lm) == 0
    tokenizer = Tokenizer.from_directory(BASE / "tokenizer")
    [directory] = Path("data").glob("my-for-*")
    assert read_meta(directory)["tokenizer_sha256"] == tokenizer.sha256
    assert Tokenizer.from_directory("logs/my/version_0/tokenizer").sha256 == tokenizer.sha256


def test_special_tokens_stay_with_the_tokenizer(lm: Run) -> None:
    chat = ["--data.special_tokens", '["<|user|>"]', "--data.vocab_size=270", "--run.name=chat", *SHORT]
    Path("my.txt").write_text("<|user|>sat?\n" * 900)
    assert lm("fit", "--data.train_text=my.txt", *SETTINGS, *chat) == 0
    assert lm("fit", "--model.init_from=logs/chat", "--data.train_text=my.txt", "--run.name=on", *SHORT) == 0
    [chatting, on] = (Tokenizer.from_directory(f"logs/{name}/version_0/tokenizer") for name in ("chat", "on"))
    assert on.special_tokens == chatting.special_tokens == ["<|endoftext|>", "<|user|>"]


def test_what_it_begins_at_is_what_the_other_has_on_that_text(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    Path("valid.txt").write_text(TEXT[::-1])
    assert begin(lm, "--data.valid_text=valid.txt", *STILL) == 0
    capfd.readouterr()
    assert lm("validate", f"--ckpt_path={BASE}", "--data.valid_text=valid.txt") == 0
    [loss] = re.findall(r"loss (\S+) nats", capfd.readouterr().out)
    assert f"{rows(Path('logs/my/version_0'))[-1]['val/loss']:.4f}" == loss


def test_without_other_data_it_trains_on_those_of_the_other(lm: Run, trained: Path) -> None:
    assert lm("fit", f"--model.init_from={BASE}", *SHORT) == 0
    config = yaml.safe_load(Path("logs/toy/version_1/config.yaml").read_text())
    assert config["data"]["directory"] == str(trained / "data/toy")
    assert config["data"]["tokenizer"] is None


def test_a_configuration_file_may_name_its_data_and_its_context(lm: Run) -> None:
    Path("mine.yaml").write_text(f"""
        data: {{train_text: my.txt, context_length: 8}}
        run: {{name: mine}}
        model: {{init_from: {BASE}}}
        """)
    assert lm("fit", "--config=mine.yaml", *SHORT, *STILL) == 0
    begun = load_model(Path("logs/mine/version_0"))[0]
    assert begun.config.context_length == 8
    assert torch.equal(begun.token_embeddings.weight, load_model(BASE)[0].token_embeddings.weight)


def test_what_it_began_with_may_be_gone_when_it_is_validated_or_goes_on(lm: Run) -> None:
    assert begin(lm) == 0
    shutil.rmtree(BASE)
    run = Path("logs/my/version_0")
    assert lm("validate", f"--ckpt_path={run}") == 0
    assert lm("fit", f"--config={run}/config.yaml", "--run.name=my", "--resume=must", "--trainer.max_steps=5") == 0
    assert rows(run)[-1]["step"] == 5


class StopAfterFour(Callback):
    """Ctrl-C in the middle of a run."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_last_that_names_a_checkpoint_counts_and_the_command_line_most(lm: Run) -> None:
    path = BASE / "checkpoints/step-000004.ckpt"
    Path("base.yaml").write_text(f"model: {{init_from: {BASE}}}")
    Path("path.yaml").write_text(f"model: {{init_from: {path}}}")
    Path("none.yaml").write_text("model: {compile: false}")
    assert find_beginning(["fit", "-c", "path.yaml", "--config=none.yaml"]) == path
    assert find_beginning(["fit", "--config=path.yaml", "--config", "base.yaml"]) == best_checkpoint(BASE) != path
    assert find_beginning(["fit", f"--model.init_from={path}", "--config=base.yaml"]) == path
    for nothing in ([], ["--config=none.yaml"], ["--config=path.yaml", "--model.init_from=null"], ["--config=absent"]):
        assert find_beginning(["fit", *nothing]) is None


def test_what_was_printed_as_its_configuration_makes_it_again(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert begin(lm, "--print_config") == 0
    Path("printed.yaml").write_text(capfd.readouterr().out)
    assert begin(lm) == lm("fit", "--config=printed.yaml") == 0
    for config in ("logs/my/version_1/config.yaml", "logs/my/version_0/config.yaml"):
        assert lm("fit", f"--config={config}", "--run.name=again") == 0
    for version in ("my/version_1", "again/version_0", "again/version_1"):
        assert rows(Path("logs", version)) == rows(Path("logs/my/version_0"))


def test_it_goes_on_with_no_run_but_its_own(lm: Run) -> None:
    before = sorted(BASE.rglob("*"))
    assert lm("fit", f"--model.init_from={BASE}", *SHORT, "--resume=auto") == 0
    assert sorted(BASE.rglob("*")) == before, "the run whose weights it began with"
    assert rows(Path("logs/toy/version_1"))[-1]["step"] == 3
    assert lm("fit", "--data.directory=data/toy", *SETTINGS, "--model.transformer.norm=post", "--resume=must") == 0
    assert rows(Path("logs/toy/version_1"))[-1]["step"] == 3, "nor does another go on with it"


def test_it_is_validated_and_goes_on_when_the_other_is_gone(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert begin(lm) == 0
    shutil.rmtree(BASE)
    for text in ([], ["--data.valid_text=my.txt"]):
        assert lm("validate", "--ckpt_path=logs/my/version_0", *text) == 0
    config = "--config=logs/my/version_0/config.yaml"
    assert lm("fit", config, "--run.name=my", "--resume=must", "--trainer.max_steps=5") == 0
    assert rows(Path("logs/my/version_0"))[-1]["step"] == 5
    capfd.readouterr()
    assert lm("fit", config) == 2
    assert "model.init_from: there is no file" in capfd.readouterr().err


def test_it_goes_on_as_if_it_had_not_stopped(lm: Run) -> None:
    longer = ("--trainer.max_steps=6", "--run.validate_every_n_steps=3")
    assert begin(lm, "--run.name=whole", *longer) == 0
    assert begin(lm, "--run.name=parts", *longer, "--trainer.callbacks=test_init_from.StopAfterFour") == 130
    assert begin(lm, "--run.name=parts", *longer, "--resume=must") == 0
    whole, parts = Path("logs/whole/version_0"), Path("logs/parts/version_0")
    assert rows(parts) == rows(whole)
    assert all(torch.equal(weight, weights(parts)[name]) for name, weight in weights(whole).items())


def test_a_padded_vocabulary_stays_as_it_is(lm: Run) -> None:
    """As a model from elsewhere may have it: more rows than its tokenizer has tokens."""
    path = best_checkpoint(BASE)
    contents = read_checkpoint(path)
    contents["transformer"]["vocab_size"] += 7
    embeddings = contents["state_dict"]["model.token_embeddings.weight"]
    contents["state_dict"]["model.token_embeddings.weight"] = torch.cat([embeddings, torch.zeros(7, 16)])
    AtomicCheckpointIO().save_checkpoint(contents, path)
    assert begin(lm, f"--model.init_from={path}") == 0
    assert weights(Path("logs/my/version_0"))["token_embeddings.weight"].shape == (264, 16)
    assert lm("validate", "--ckpt_path=logs/my/version_0", "--model.init_from=null") == 0
    assert lm("validate", f"--ckpt_path={path}", "--data.valid_text=my.txt") == 0
    assert begin(lm, f"--model.init_from={path}", "--run.name=my", "--resume=must", "--trainer.max_steps=5") == 0
    assert rows(Path("logs/my/version_0"))[-1]["step"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_from=absent"], "model.init_from: there is no file absent"),
        (["--model.init_from=my.txt"], "model.init_from: my.txt (12,800 bytes) is no whole checkpoint file"),
        (
            ["--model.transformer.d_model=24", "--model.transformer.norm=pre"],
            "is of another model: d_model: checkpoint 16, now 24; norm: checkpoint post, now pre",
        ),
        (["--run.bundle=leaderboard"], "what is handed in there begins from nothing"),
        (["--data.tokenizer=other"], "was trained with another tokenizer than other: its ids mean other tokens"),
        (["--data.tokenizer=nowhere"], "data.tokenizer: there is no folder nowhere"),
        (["--data.vocab_size=300"], "vocab_size=300, but the tokenizer"),
        ([f"--ckpt_path={BASE}/checkpoints/step-000008.ckpt"], "ckpt_path and model.init_from: a run goes on from one"),
    ],
)
def test_what_cannot_be_begun_with_is_one_line_and_leaves_nothing(
    lm: Run, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Tokenizer({i: bytes([i]) for i in range(256)}, [], []).save("other")
    capfd.readouterr()
    assert begin(lm, *arguments) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not Path("logs/my").exists()


def test_a_dataset_of_another_tokenizer_is_refused(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("data/toy", "data/other", ignore=shutil.ignore_patterns("tokenizer"))
    Tokenizer({i: bytes([i]) for i in range(256)}, [], []).save("data/other/tokenizer")
    arguments = ["--data.directory=data/other", *SHORT]
    capfd.readouterr()
    assert lm("fit", f"--model.init_from={BASE}", *arguments) == 2
    assert "was trained with another tokenizer than data/other/tokenizer: its" in capfd.readouterr().err
    Path("data/other/tokenizer/vocab.json").write_text("{")
    assert lm("fit", f"--model.init_from={BASE}", *arguments) == 2
    assert capfd.readouterr().err.startswith("error: model.init_from: ")


def test_without_init_from_a_configuration_that_had_one_begins_with_nothing(lm: Run) -> None:
    assert begin(lm) == 0
    again = ("--config=logs/my/version_0/config.yaml", "--model.init_from=null", "--run.name=fresh", *STILL)
    assert lm("fit", *again) == 0
    base, fresh = (weights(run)["token_embeddings.weight"] for run in (BASE, Path("logs/fresh/version_0")))
    assert not torch.equal(base, fresh)


def test_from_python_the_tokenizers_are_compared_and_validation_has_the_weights_too(lm: Run) -> None:
    network = load_model(BASE)[0].config
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", use_distributed_sampler=False, max_steps=1, **quiet)
    data = TokenDataModule(directory="data/toy", context_length=16)
    module = LanguageModel(network, init_from=str(BASE))
    trainer.validate(module, data, verbose=False)
    best = json.loads(best_checkpoint(BASE).with_suffix(".json").read_text())["metrics"]["val/loss"]
    assert module.validation_result["val/loss"] == pytest.approx(best, abs=1e-6)
    with pytest.raises(ValueError, match="has another tokenizer than the data: its ids mean other tokens"):
        other = TokenDataModule(train_text="my.txt", vocab_size=270, context_length=16)
        trainer.fit(LanguageModel(network, init_from=str(BASE)), other)


def test_a_sweep_knows_what_fit_would_refuse(lm: Run) -> None:
    good = ["fit", f"--model.init_from={BASE}", "--data.train_text=my.txt", "--trainer.max_steps=5"]
    found = what_is_refused([good, [*good, "--trainer.max_steps=2"], ["fit", "--trainer.max_steps=5"]])
    assert [[line.split()[0] for line in lines] for lines in found] == [
        [],
        ["model.schedule.warmup_steps=2"],
        ["model.schedule.warmup_steps=50"],
    ]


def test_a_model_without_a_run_is_asked_what_to_train_on(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    (BASE / "config.yaml").unlink()
    capfd.readouterr()
    assert lm("fit", f"--model.init_from={BASE}", "--model.transformer.norm=post", *SETTINGS) == 2
    assert capfd.readouterr().err == (
        "error: model.init_from: say what to train on, for example --data.train_text my.txt\n"
    )
    named = ["--data.corpus=builtin", "--trainer.max_steps=-5"]
    assert lm("fit", f"--model.init_from={BASE}", "--model.transformer.norm=post", *SETTINGS, *named) == 2
    assert "say what to train on" not in capfd.readouterr().err
