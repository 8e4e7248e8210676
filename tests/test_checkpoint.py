"""Checkpoints survive kills, failing writes and full disks; damaged and foreign ones are refused by name."""

import builtins
import errno
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    InUseError,
    best_checkpoint,
    check_folder,
    find_run,
    load_checkpoint,
    load_model,
    lock_run,
    newest_checkpoint,
    note_metrics,
    prune,
    read_checkpoint,
    recover,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from lm.model import TransformerConfig, TransformerLM
from lm.optim import AdamW

CONFIG = TransformerConfig(vocab_size=50, context_length=8, num_layers=2, num_heads=2, d_model=8, d_ff=16)
IO = AtomicCheckpointIO()


def trained(config: TransformerConfig = CONFIG, steps: int = 2) -> tuple[TransformerLM, AdamW]:
    torch.manual_seed(0)
    model = TransformerLM(config)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save_step(folder: Path, step: int, size: int = 1000) -> Path:
    """A run's checkpoint whose every number is its step."""
    path = folder / f"step-{step:06d}.ckpt"
    IO.save_checkpoint({"global_step": step, "state_dict": {"w": torch.full((size,), float(step))}}, path)
    return path


def check_step(path: Path) -> int:
    """The step of a checkpoint of `save_step`, after looking at all of it."""
    contents = read_checkpoint(path)
    step = contents["global_step"]
    assert path.name == f"step-{step:06d}.ckpt"
    assert (contents["state_dict"]["w"] == step).all()
    return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ the handout's pair


@pytest.mark.parametrize("kind", ["path", "str", "file"])
def test_training_goes_on_from_a_saved_file_as_if_it_had_not_stopped(tmp_path: Path, kind: str) -> None:
    model, optimizer = trained()
    out: Any = {"path": tmp_path / "a.pt", "str": str(tmp_path / "a.pt"), "file": io.BytesIO()}[kind]
    save_checkpoint(model, optimizer, 17, out)
    if kind == "file":
        out.seek(0)
    other, other_optimizer = trained(steps=1)
    assert load_checkpoint(out, other, other_optimizer) == 17
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(torch.arange(8)[None]).square().mean().backward()
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_any_module_and_optimizer_will_do(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (tmp_path / "a.json").write_text('{"a file": "of the user"}')
    save_checkpoint(model, optimizer, 3, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", model, optimizer) == 3
    assert names(tmp_path) == ["a.json", "a.pt"]


def test_a_model_comes_back_from_any_of_our_files(tmp_path: Path) -> None:
    for config in (CONFIG, replace(CONFIG, head="tied", norm="post"), replace(CONFIG, norm="none", ffn="silu")):
        model, optimizer = trained(config)
        logits = model(torch.arange(8)[None])
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        save_checkpoint(model, optimizer, 2, tmp_path / "plain.pt")
        IO.save_checkpoint(
            {"global_step": 2, "transformer": asdict(config), "state_dict": state, "TokenDataModule": {"seed": 5}},
            tmp_path / "lightning.ckpt",
        )
        for name in ("plain.pt", "lightning.ckpt"):
            rebuilt, info = load_model(tmp_path / name)
            assert rebuilt.config == config
            assert not rebuilt.training
            assert torch.equal(rebuilt(torch.arange(8)[None]), logits)
            assert (info["step"], info["path"]) == (2, str(tmp_path / name))
        assert info["data"] == {"seed": 5}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path, prefix: str) -> None:
    model, optimizer = trained()
    save_checkpoint(model, optimizer, 1, tmp_path / "a.pt")
    contents = torch.load(tmp_path / "a.pt", weights_only=True)
    contents["model"] = {prefix + name: tensor for name, tensor in contents["model"].items()}
    torch.save(contents, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", model, optimizer) == 1
    load_model(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"vocab_size": 60}, ["lm_head.weight: checkpoint (50, 8), model (60, 8)", "look at vocab_size"]),
        ({"d_model": 16}, ["layers.0.ln1.weight: checkpoint (8,), model (16,)", "more; look at d_model"]),
        ({"d_ff": 24}, ["layers.1.ffn.w2.weight: checkpoint (8, 16), model (8, 24)", "look at d_ff"]),
        ({"num_layers": 3}, ["layers.2.ln1.weight: checkpoint lacks it, model (8,)", "look at num_layers"]),
        ({"num_layers": 1}, ["layers.1.ln1.weight: checkpoint (8,), model lacks it", "look at num_layers"]),
        ({"norm": "none"}, ["ln_final.weight: checkpoint (8,), model lacks it", "look at norm"]),
        ({"head": "tied"}, ["lm_head.weight: checkpoint (50, 8), model lacks it", "look at head"]),
        ({"ffn": "silu"}, ["layers.0.ffn.w3.weight: checkpoint (16, 8), model lacks it", "look at ffn"]),
    ],
)
def test_weights_of_another_model_are_refused_with_both_shapes_and_the_setting(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    model, optimizer = trained()
    save_checkpoint(model, optimizer, 1, tmp_path / "a.pt")
    other, other_optimizer = trained(replace(CONFIG, **change))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path / "a.pt", other, other_optimizer)
    message = str(raised.value)
    assert str(tmp_path / "a.pt") in message
    for part in parts:
        assert part in message or " more; " in message
    assert message.endswith(parts[1].removeprefix("more; "))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])  # nothing was half loaded


def test_a_file_of_another_kind_says_what_it_lacks(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="lacks iteration, optimizer"):
        load_checkpoint(tmp_path / "a.pt", *trained())
    with pytest.raises(CheckpointError, match="no model configuration"):
        load_model(tmp_path / "a.pt")
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save({"format": 2}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="has format 2, this version reads format 1: update"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save({"transformer": {"vocab_size": 5, "num_experts": 3}, "state_dict": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"cannot build: .*num_experts"):
        load_model(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(tmp_path / "b.pt")


def test_a_checkpoint_of_each_format_so_far_still_loads() -> None:
    """format-1.ckpt: 30 steps of `python -m lm fit` on the tokens 0, 7, 2, 9, ... (7 more each time, modulo 12)."""
    model, info = load_model(Path(__file__).parent / "checkpoints" / "format-1.ckpt")
    tokens = torch.arange(16)[None] * 7 % 12
    logits = model(tokens)
    assert torch.equal(logits.argmax(-1), (tokens + 7) % 12)
    expected = torch.tensor([0.3972556, 0.8910465, 0.7340088, 0.3663716, 2.8763211, -1.6823807])
    torch.testing.assert_close(logits[0, -1, :6], expected, rtol=1e-4, atol=1e-5)
    assert info["step"] == 30
    assert info["data"]["context_length"] == 16
    assert (info["transformer"]["head"], info["transformer"]["norm"]) == ("tied", "pre")


# ------------------------------------------------------------------------------------------------------ damage


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    data = path.read_bytes()
    for position in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
        path.write_bytes(flip(data, position))
        with pytest.raises(CheckpointError, match="differs from the sha256 in its record"):
            read_checkpoint(path)


def test_without_a_record_the_archive_sums_see_a_flipped_bit_in_the_weights(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    path.with_suffix(".json").unlink()
    data = path.read_bytes()
    refused = 0
    for position in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
        path.write_bytes(flip(data, position))
        try:
            contents = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # a bit of padding or of a time stamp
            assert (contents["state_dict"]["w"] == 1).all()
    assert refused > 40


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", r"is empty \(0 bytes\)"),
        (lambda data: data[:1], "1 bytes"),
        (lambda data: data[: len(data) // 2], "bytes"),
        (lambda data: data[:-1], "bytes"),
        (lambda data: bytes(len(data)), "bytes"),
        (lambda data: b"Once upon a time", "16 bytes"),
        (lambda data: pickle.dumps({"global_step": 1}), "bytes"),
    ],
)
def test_a_damaged_file_is_named_with_its_size_and_the_good_one_before(
    tmp_path: Path, recorded: bool, change: Callable[[bytes], bytes], message: str
) -> None:
    good, path = save_step(tmp_path, 1), save_step(tmp_path, 2)
    path.write_bytes(change(path.read_bytes()))
    if not recorded:
        path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=message) as raised:
        read_checkpoint(path)
    assert str(raised.value).startswith(str(path))
    assert str(raised.value).endswith(f"; {good} is good")
    assert "\n" not in str(raised.value)


def test_the_file_of_another_step_under_this_name_is_refused(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="damaged or replaced"):
        read_checkpoint(second)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "nested"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_malicious_file_is_refused_and_nothing_runs(tmp_path: Path, form: str, recorded: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "step-000001.ckpt"
    attack: Any = Malicious(marker)
    if recorded:  # the attacker gives a proper record along
        IO.save_checkpoint({"global_step": 1, "state_dict": attack}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": attack}))
    elif form == "nested":
        for _ in range(200):
            attack = [attack]
        torch.save({"state_dict": {"w": attack}}, path)
    else:
        torch.save({"state_dict": attack}, path, _use_new_zipfile_serialization=form == "torch")
    for read in (read_checkpoint, load_model, IO.load_checkpoint):
        with pytest.raises(CheckpointError):
            read(path)
    with pytest.raises(CheckpointError):
        IO.load_checkpoint(path, weights_only=False)
    assert not marker.exists()


def test_class_paths_in_a_file_are_only_text(tmp_path: Path) -> None:
    """Lightning's own load_from_checkpoint imported and called them (CVE-2026-58659)."""
    model, _ = trained()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    attack = {"_instantiator": "os.system", "_class_path": "os.abort", "command": f"touch {tmp_path / 'marker'}"}
    contents = {"hyper_parameters": attack, "transformer": asdict(CONFIG), "state_dict": state}
    IO.save_checkpoint(contents, tmp_path / "a.ckpt")
    load_model(tmp_path / "a.ckpt")
    IO.save_checkpoint({**contents, "transformer": {**asdict(CONFIG), **attack}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="cannot build"):
        load_model(tmp_path / "a.ckpt")
    assert not (tmp_path / "marker").exists()


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    torch.save({"w": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_checkpoint(tmp_path / "b")


# ------------------------------------------------------------------------------------------- which one a run takes


def test_the_newest_good_one_wins_and_bad_ones_are_named_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    first, second, third = (save_step(folder, step) for step in (9, 10, 100))
    assert newest_checkpoint(tmp_path) == newest_checkpoint(folder) == third
    third.write_bytes(b"")
    assert newest_checkpoint(tmp_path) == second
    assert "step-000100.ckpt is empty (0 bytes)" in capsys.readouterr().err
    assert third.exists()  # only the run that resumes may rename
    second.with_suffix(".json").write_text("{")
    assert newest_checkpoint(tmp_path, set_aside=True) == first
    assert "kept as step-000100.ckpt.bad" in capsys.readouterr().err
    first.write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=r"step-000009\.ckpt has 1 bytes"):
        newest_checkpoint(tmp_path, set_aside=True)
    assert [name for name in names(folder) if name.endswith(".bad")] == [
        f"step-{step}.{kind}.bad" for step in ("000009", "000100") for kind in ("ckpt", "json")
    ]
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        newest_checkpoint(tmp_path / "other")


def test_the_best_and_the_last_ones_stay(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 3.6}
    for step, loss in losses.items():
        note_metrics(save_step(tmp_path, step), {"val/loss": loss})
    save_step(tmp_path, 6)  # not validated yet
    assert best_checkpoint(tmp_path).name == "step-000002.ckpt"
    removed = prune(tmp_path, keep_last=2, keep_best=1)
    assert sorted(path.name for path in removed) == ["step-000001.ckpt", "step-000003.ckpt", "step-000004.ckpt"]
    assert names(tmp_path) == [f"step-00000{step}.{kind}" for step in (2, 5, 6) for kind in ("ckpt", "json")]
    (tmp_path / "step-000002.ckpt").write_bytes(b"")
    assert best_checkpoint(tmp_path).name == "step-000005.ckpt"
    with pytest.raises(FileNotFoundError):
        note_metrics(tmp_path / "step-000001.ckpt", {})


def test_without_validation_the_newest_is_the_best_and_a_diverged_loss_is_not(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    second = save_step(tmp_path, 2)
    assert best_checkpoint(tmp_path) == second
    (tmp_path / "logs/name/version_0").mkdir(parents=True)
    (tmp_path / "logs/name/version_0/checkpoints").symlink_to(tmp_path)
    assert best_checkpoint(tmp_path / "logs/name").samefile(second), "of a folder of runs that of the newest"
    note_metrics(second, {"val/loss": float("nan")})
    note_metrics(tmp_path / "step-000001.ckpt", {"val/loss": 9.0})
    assert best_checkpoint(tmp_path).name == "step-000001.ckpt"
    assert load_step_metrics(second)["val/loss"] != load_step_metrics(second)["val/loss"]


def load_step_metrics(path: Path) -> dict[str, float]:
    return json.loads(path.with_suffix(".json").read_text())["metrics"]


def test_the_run_with_the_latest_checkpoint_is_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m lm fit"):
        find_run(tmp_path)
    for name, age in (("a/version_0", 20), ("b/version_3", 0), ("a/version_1", 10)):
        record = save_step(tmp_path / name / "checkpoints", 1).with_suffix(".json")
        os.utime(record, (time.time() - age,) * 2)
    assert find_run(tmp_path) == tmp_path / "b" / "version_3"


def test_a_run_behind_a_link_is_found_and_links_upwards_lead_nowhere(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    save_step(tmp_path / "moved" / "version_0" / "checkpoints", 1)
    (tmp_path / "moved" / "round").symlink_to(tmp_path / "moved")
    logs.mkdir()
    for name, target in {"here": ".", "up": "..", "root": "/", "itself": "itself", "nowhere": "gone"}.items():
        (logs / name).symlink_to(target)
    with pytest.raises(FileNotFoundError, match="python -m lm fit"):
        find_run(logs)
    (logs / "a").symlink_to(tmp_path / "moved")
    assert find_run(logs) == logs / "a" / "version_0"
    os.replace(tmp_path / "moved", logs / "t")
    (logs / "a").unlink()
    (logs / "a").symlink_to("t")
    assert find_run(logs) == logs / "t" / "version_0", "its own name, not a link's"
    os.replace(logs / "t" / "version_0" / "checkpoints", tmp_path / "large")
    (logs / "t" / "version_0" / "checkpoints").symlink_to(tmp_path / "large")
    assert find_run(logs) == logs / "t" / "version_0"


def test_a_second_run_in_the_same_directory_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = lock_run(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {os.getpid()} on "):
        lock_run(tmp_path)
    first.close()
    pid = forked(lambda: (lock_run(tmp_path), time.sleep(600)))
    for _ in range(1000):
        if str(pid) in (tmp_path / "lock").read_text():
            break
        time.sleep(0.05)
    with pytest.raises(ValueError, match=f"in use by process {pid} "):
        lock_run(tmp_path)
    kill(pid)
    lock_run(tmp_path).close()  # a killed process leaves no lock behind


def test_who_has_only_just_claimed_a_run_is_waited_for_until_it_has_said_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock_run(tmp_path) as first:
        first.truncate(0)
        writer = threading.Timer(0.3, lambda: print("process 7 on node3", file=first, flush=True))
        writer.start()
        with pytest.raises(InUseError, match="is in use by process 7 on node3: wait"):
            lock_run(tmp_path)
        writer.join()
        first.truncate(0)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        with pytest.raises(InUseError, match="is in use by another process: wait"):
            lock_run(tmp_path)


# ------------------------------------------------------------------------------------------------- failing writes


class Disk:
    """Counts what the writers ask of the system, and lets call number `fails_at` fail."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], Any], fails_at: int = 0, each_write: bool = True
    ):
        self.calls: list[str] = []
        self.each_write = each_write  # else a row of writes counts as one call
        self.fails_at, self.fail = fails_at, fail
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        monkeypatch.setattr("tokenizer.files.open", self.open, raising=False)

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            detail = Path(args[1]).suffix if name == "replace" else ""
            if name == "write" and self.calls[-1] == "write" and not self.each_write:
                return function(*args)
            self.calls.append(name + detail)
            if len(self.calls) == self.fails_at:
                self.fail()
            return function(*args)

        return call

    def open(self, *args: Any, **kwargs: Any) -> Any:
        file = self.counted("open", lambda: builtins.open(*args, **kwargs))()  # noqa: SIM115
        write = self.counted("write", file.write)
        disk_flush = self.counted("flush", file.flush)

        class File:
            def __getattr__(self, name: str) -> Any:
                return {"write": write, "flush": disk_flush}.get(name) or getattr(file, name)

            def __enter__(self) -> "File":
                return self

            def __exit__(self, *error: Any) -> None:
                file.close()

        return File()


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_file_is_on_the_device_before_it_has_its_name_and_the_record_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch, fail=lambda: None)
        save_step(tmp_path, 1)
    durable = [call for call in disk.calls if not call.startswith(("open", "write", "flush"))]
    assert durable == ["fsync", "replace.ckpt", "fsync", "fsync", "replace.json", "fsync"]


def test_when_any_write_fails_the_checkpoint_before_is_there_and_no_part_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    before = names(tmp_path)
    for n in itertools.count(1):
        with monkeypatch.context() as patch:
            disk = Disk(patch, disk_full, fails_at=n)
            try:
                save_step(tmp_path, 2)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert "\n" not in str(error)
                if "replace.ckpt" not in disk.calls:
                    assert "bytes or a little more" in str(error)
            else:
                break
        assert check_step(newest_checkpoint(tmp_path)) == 1 + ("replace.json" in disk.calls[: n - 1])
        assert {*names(tmp_path)} <= {*before, "step-000002.ckpt", "step-000002.json"}
        for path in tmp_path.glob("step-000002.*"):
            path.unlink()
    assert len(disk.calls) < n < 100
    assert check_step(newest_checkpoint(tmp_path)) == 2


def forked(action: Callable[[], Any]) -> int:
    """Run `action` in a child process that has all of this one; returns its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads: the child uses none of them
        pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            action()
        finally:
            os._exit(0)
    return pid


def kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def test_when_the_process_dies_at_any_call_the_newest_or_the_one_before_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for overwrite in (False, True):
        for n in itertools.count(1):
            folder = tmp_path / f"{overwrite}-{n}"
            save_step(folder, 1)
            if overwrite:
                save_step(folder, 2)

            def die(folder: Path = folder, n: int = n) -> None:
                with pytest.MonkeyPatch.context() as patch:
                    Disk(patch, lambda: os._exit(9), fails_at=n, each_write=False)
                    save_step(folder, 2)

            status = os.waitpid(forked(die), 0)[1]
            recover(folder)
            found = check_step(newest_checkpoint(folder))
            assert found == 2 if overwrite or not status else found in (1, 2)
            assert {*names(folder)} <= {f"step-00000{step}.{kind}" for step in (1, 2) for kind in ("ckpt", "json")}
            if status == 0:
                break
        assert 10 < n < 100


@pytest.fixture
def acknowledged() -> Iterator[tuple[int, int]]:
    pipe = os.pipe()
    yield pipe
    for end in pipe:
        os.close(end)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on another file system where there is one: no file staged there could be renamed from it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield Path(directory)


@pytest.mark.parametrize(("rounds", "size"), [(12, 500_000), pytest.param(25, 4_000_000, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_over_and_over_loses_at_most_the_save_it_was_in(
    tmp_path: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
    size: int,
    acknowledged: tuple[int, int],
) -> None:
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    run, randomness = tmp_path / "run", random.Random(1)
    folder = run / "checkpoints"
    save_step(folder, 1, size)
    for _ in range(rounds):
        lock_run(run).close()
        recover(run)
        prune(run)  # a run does so after its first save
        step = check_step(newest_checkpoint(run, set_aside=True))

        def save_forever(step: int = step) -> None:
            lock = lock_run(run)
            for k in itertools.count(step + 1):
                save_step(folder, k, size)
                os.write(acknowledged[1], k.to_bytes(8, "little"))
                prune(run)
            lock.close()

        pid = forked(save_forever)
        done = int.from_bytes(os.read(acknowledged[0], 8), "little")
        time.sleep(randomness.uniform(0, 0.05))
        kill(pid)
        os.set_blocking(acknowledged[0], False)
        try:
            while data := os.read(acknowledged[0], 8):
                done = int.from_bytes(data, "little")
        except BlockingIOError:
            os.set_blocking(acknowledged[0], True)
        assert check_step(newest_checkpoint(run)) >= done > step
        recover(run)
        assert len(names(folder)) <= 2 * 5  # a few, however often it was killed
    assert not [name for name in names(folder) if not name.startswith("step-") or name.endswith(".bad")]
    assert names(elsewhere) == []


def test_a_full_disk_is_said_with_the_bytes_needed_and_free(tmp_path: Path) -> None:
    """By a limit on the size of files, which any user may set."""
    first = save_step(tmp_path, 1)

    def save_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_step(tmp_path, 2, size=1_000_000)
        except OSError as error:
            with open(tmp_path / "message", "w") as file:
                file.write(str(error))

    os.waitpid(forked(save_too_much), 0)
    message = (tmp_path / "message").read_text()
    assert f"cannot save {tmp_path / 'step-000002.ckpt'}: File too large; it takes 4,000,000 bytes" in message
    assert "are free: make room and resume the run" in message
    assert newest_checkpoint(tmp_path) == first
    assert names(tmp_path) == ["message", first.with_suffix(".ckpt").name, first.with_suffix(".json").name]


FILL_A_TMPFS = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_checkpoint import check_step, names, newest_checkpoint, save_step
folder = Path(sys.argv[1])
for step in range(1, 100):
    try:
        save_step(folder, step, size=200_000)
    except OSError as error:
        print(error)
        break
assert check_step(newest_checkpoint(folder)) == step - 1, names(folder)
assert len(names(folder)) == 2 * (step - 1), names(folder)
"""


@pytest.mark.slow
def test_on_a_disk_that_fills_up_the_last_whole_checkpoint_stays(tmp_path: Path) -> None:
    command = f'mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    try:
        subprocess.run(["unshare", "-Urm", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here")
    result = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command, FILL_A_TMPFS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "No space left on device; it takes 800,000 bytes or a little more" in result.stdout


@pytest.mark.parametrize("obstacle", ["file", "parent is a file", "long name", "read-only", "full"])
def test_a_folder_that_cannot_be_written_to_is_found_before_the_run(
    tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, num_bytes, message = tmp_path / "run", 0, "cannot write to .*: choose another directory"
    if obstacle == "file":
        folder.write_text("")
    elif obstacle == "parent is a file":
        folder.write_text("")
        folder /= "checkpoints"
    elif obstacle == "long name":
        folder /= "x" * 300
    elif obstacle == "read-only":
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
    else:
        num_bytes, message = 10**18, "the run needs about 1,000,000,000,000,000,000: make room"
    with pytest.raises(OSError, match=message):
        check_folder(folder, num_bytes)


def test_trying_a_folder_out_leaves_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "folder", 10)
    assert names(tmp_path / "new" / "folder") == []


def test_what_a_killed_process_left_is_tidied_up(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    whole, broken = save_step(folder, 1), folder / "step-000003.ckpt"
    whole.with_suffix(".json").unlink()  # killed between the file and its record
    broken.write_bytes(whole.read_bytes()[:-9])
    for part in (tmp_path / ".metrics.jsonl.17.part", folder / ".step-000002.ckpt.17.part"):
        part.write_bytes(b"half")
    recover(tmp_path)
    assert names(tmp_path) == ["checkpoints"]
    assert names(folder) == ["step-000001.ckpt", "step-000001.json", "step-000003.ckpt"]
    assert check_step(newest_checkpoint(tmp_path)) == 1


# ----------------------------------------------------------------------------------------------------- other states


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]  # noqa: NPY002

    before = rng_state()
    try:
        draw()  # leaves half a pair of normal numbers in both generators
        IO.save_checkpoint({"rng": rng_state()}, tmp_path / "a.ckpt")
        expected = draw()
        set_rng_state(read_checkpoint(tmp_path / "a.ckpt")["rng"])
        assert draw() == expected
    finally:
        set_rng_state(before)
