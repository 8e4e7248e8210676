"""The whole path with the real parts: text, tokenizer, token files, training, validation, generated text."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lm import __main__
from tokenizer import Tokenizer

SMALL = [
    "--data.context_length=32",
    "--data.batch_size=8",
    "--model.transformer.num_layers=1",
    "--model.transformer.num_heads=2",
    "--model.transformer.d_model=32",
    "--model.transformer.d_ff=64",
    "--model.schedule.warmup_steps=5",
    "--model.schedule.follow=steps",
    "--run.validate_every_n_steps=20",
    "--run.max_minutes=null",
    "--run.sample_tokens=16",
    "--trainer.accelerator=cpu",
]

Run = Callable[..., int]


@pytest.fixture
def lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`python -m lm ...` in this process and an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])
    return lambda *arguments: __main__.main(list(arguments))


def test_a_users_own_text_becomes_a_model_that_writes(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    story = "The cat sat on the mat. The dog ran to the door and back.\n<|endoftext|>\n"
    Path("my.txt").write_text(story * 300)
    assert lm("fit", "--data.train_text=my.txt", "--data.vocab_size=300", "--trainer.max_steps=40", *SMALL) == 0
    run = Path("logs/my/version_0")
    losses = [json.loads(line).get("val/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = [loss for loss in losses if loss is not None]
    assert last < first < math.log(300)
    assert Tokenizer.from_directory(run / "tokenizer").vocab_size <= 300

    capfd.readouterr()
    assert lm("validate") == 0
    assert f"loss {last:.4f} nats per token" in capfd.readouterr().out
    assert lm("generate", "--prompt=The cat", "--max_new_tokens=8", "--seed=1") == 0
    said = capfd.readouterr().out
    assert said.startswith("The cat")
    assert lm("generate", "--prompt=The cat", "--max_new_tokens=8", "--seed=1") == 0
    assert capfd.readouterr().out == said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fit_with_nothing_else_in_an_empty_folder(lm: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """The very command of the README, cut short by its own settings alone, and not by the clock on a busy machine."""
    steps = ["--trainer.max_steps=60", "--model.schedule.warmup_steps=10", "--run.max_minutes=14"]
    assert lm("fit", *steps, "--run.sample_tokens=32") == 0
    said = capfd.readouterr().out
    assert "no model can get below 0.0" in said
    assert "sample:\n  Once upon a time" in said
    assert Path("data/builtin/train.npy").is_file()
    result = json.loads(Path("logs/builtin/version_0/summary.json").read_text())["validation"]
    assert result["val/entropy_bits_per_byte"] < result["val/bits_per_byte"] < 2
    assert lm("validate") == 0
    assert f"(no model can get below {result['val/entropy_bits_per_byte']:.4f})" in capfd.readouterr().out
