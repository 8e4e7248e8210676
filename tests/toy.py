"""A corpus and a model so small that a whole run takes a second: what the tests of training share."""

import hashlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer import Tokenizer

SETTINGS = [
    "--data.context_length=16",
    "--data.batch_size=4",
    "--model.transformer.num_layers=1",
    "--model.transformer.num_heads=2",
    "--model.transformer.d_model=16",
    "--model.transformer.d_ff=32",
    "--model.schedule.warmup_steps=2",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--trainer.max_steps=8",
    "--run.validate_every_n_steps=4",
    "--run.sample_tokens=4",
    "--run.name=toy",
    "--run.max_minutes=null",
    "--model.schedule.follow=steps",
]


def make_dataset(folder: Path, words: int = 1000) -> Path:
    """A dataset of bytes, as `python -m lm prepare` would write it, of which `words` are for training."""
    tokenizer = Tokenizer({0: b"<|endoftext|>"} | {i + 1: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split, seed, count in (("train", 0, words), ("valid", 1, 100)):
        text = " ".join(random.Random(seed).choices(["the", "cat", "sat", "on", "a", "mat"], k=count)).encode()
        ids = np.frombuffer(text, np.uint8).astype(np.uint16) + 1
        np.save(folder / f"{split}.npy", ids)
        splits[split] = {
            "file": f"{split}.npy",
            "num_tokens": len(ids),
            "num_bytes": len(text),
            "num_documents": 1,
            "dtype": "uint16",
            "max_id": int(ids.max()),
            "text_sha256": hashlib.sha256(text).hexdigest(),
        }
    meta = json.loads((folder / "tokenizer" / "meta.json").read_text())
    record = {
        "format": 1,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "special_tokens": tokenizer.special_tokens,
        "unicode": meta["unicode"],
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(record))
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    clock = ("wall_seconds", "tokens_per_second", "mfu")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]


def disk_calls(monkeypatch: Any) -> list[tuple[str, int, str]]:
    """Calls of os.pwrite, os.fsync and os.replace from now on: ("write", inode, ""), ("name", inode, new name)."""
    calls: list[tuple[str, int, str]] = []
    pwrite, fsync, replace = os.pwrite, os.fsync, os.replace

    def note(what: str, file: Any, name: str = "") -> None:
        calls.append((what, os.stat(file).st_ino, name))  # noqa: PTH116 - of a descriptor or a path

    monkeypatch.setattr(os, "pwrite", lambda file, *rest: note("write", file) or pwrite(file, *rest))
    monkeypatch.setattr(os, "fsync", lambda file: note("flush", file) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: note("name", old, Path(new).name) or replace(old, new))
    return calls


def flushed_before_it_was_named(calls: list[tuple[str, int, str]], name: str) -> bool:
    """Whether the file that got `name` last was on the device before."""
    named = max(i for i, call in enumerate(calls) if call[::2] == ("name", name))
    return ("flush", calls[named][1], "") in calls[:named]


def command(*arguments: str) -> list[str]:
    """What a user types."""
    return [sys.executable, "-m", "lm", *arguments]
