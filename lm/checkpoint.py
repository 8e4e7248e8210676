"""Checkpoints that are whole or absent: written beside their place, recorded with their hash, checked before use.

A checkpoint of a run is two files, written in this order and each atomically:

    checkpoints/step-000500.ckpt    what torch.save makes of tensors and plain values
    checkpoints/step-000500.json    its record: size, sha256, step, metrics

It exists only once its record does. A process that is killed at any moment leaves the newest one or the one before.
Reading never executes what a file says: everything is loaded with `weights_only=True`.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from lm.model import TransformerConfig, TransformerLM
from tokenizer.files import atomic_write

FORMAT = 1
FOLDER = "checkpoints"

PathLike = str | os.PathLike[str]
BinaryFile = IO[bytes] | io.BufferedIOBase
Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used, and why."""


# ------------------------------------------------------------------------------------------------ the handout's pair


def save_checkpoint(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: PathLike | BinaryFile
) -> None:
    """Write model, optimizer and iteration to a path (atomically) or an open binary file. CS336 A1 section 5.2.

    Raises:
        OSError: it could not be written; an older file under this name is untouched.
    """
    contents: dict[str, Any] = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
    }
    if isinstance(model, TransformerLM):
        contents["transformer"] = asdict(model.config)
    if isinstance(out, str | os.PathLike):
        write_checkpoint(contents, out)
    else:
        torch.save(contents, cast(IO[bytes], out))


def load_checkpoint(src: PathLike | BinaryFile, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote, in place; returns the iteration.

    Raises:
        FileNotFoundError: no file.
        CheckpointError: damaged, foreign, or of a model with other names or shapes (all of them listed).
    """
    if isinstance(src, str | os.PathLike):
        contents, name = read_checkpoint(src), str(src)
    else:
        contents, name = _load(src, "cpu", "the checkpoint"), "the checkpoint"
    missing = {"model", "optimizer", "iteration"} - contents.keys()
    if missing:
        raise CheckpointError(f"{name} was not written by save_checkpoint: it lacks {', '.join(sorted(missing))}")
    load_weights(model, contents["model"], name)
    optimizer.load_state_dict(contents["optimizer"])
    return contents["iteration"]


# ----------------------------------------------------------------------------------------------------- one file


class _HashingFile:
    """What torch.save writes to: passes bytes on and keeps their hash, size and the error that stopped them."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save turns it into a RuntimeError about positions in the file
            raise
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


def num_tensor_bytes(contents: Any) -> int:
    """The bytes of all tensors in nested dicts, lists and tuples, each storage once: the least that saving takes."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            for value in item.values():
                visit(value)
        elif isinstance(item, list | tuple):
            for value in item:
                visit(value)

    visit(contents)
    return sum(storages.values())


def write_checkpoint(contents: dict[str, Any], path: PathLike) -> tuple[str, int]:
    """Save tensors and plain values under `path`, whole or not at all; returns the file's sha256 and size.

    Raises:
        OSError: the disk is full (with the bytes needed and free), or the folder cannot be written to.
    """
    path = Path(path)
    writer = None
    try:
        with atomic_write(path) as file:
            writer = _HashingFile(file)
            torch.save(contents, writer)  # type: ignore[arg-type] # anything with write and flush will do
            if _read_record(path.with_suffix(".json")):
                path.with_suffix(".json").unlink()  # it describes the file that is now replaced
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else writer.error if writer else None
        if cause is None:
            raise
        raise _explained(cause, path, num_tensor_bytes(contents)) from None
    return writer.hash.hexdigest(), writer.size


def _explained(error: OSError, path: Path, needed: int) -> OSError:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    message = f"cannot save {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message += f"; it takes {needed:,} bytes or a little more, {free:,} are free: make room and resume the run"
    return OSError(error.errno or errno.EIO, message)


def read_checkpoint(path: PathLike, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint file, after checking it against its record (or its own checksums, without one).

    Raises:
        FileNotFoundError: no file.
        CheckpointError: cut off, damaged, foreign or from a newer version; names a good one beside it.
    """
    path = check_checkpoint(path)
    try:
        with open(path, "rb") as file:
            return _load(file, map_location, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_good_one_beside(path)}") from None


def check_checkpoint(path: PathLike) -> Path:
    """The path, if nothing is wrong with the file there.

    Raises:
        FileNotFoundError: no file.
        CheckpointError: cut off or damaged; names a good one beside it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    problem = find_damage(path)
    if problem:
        raise CheckpointError(f"{path} {problem}{_good_one_beside(path)}")
    return path


def glance_at(path: PathLike) -> None:
    """Refuse, by the directory at its end alone, a file that is no archive.

    Raises:
        CheckpointError: no checkpoint, or one cut off; names a good one beside it.
    """
    if not zipfile.is_zipfile(path):
        check_checkpoint(path)


def _good_one_beside(path: Path) -> str:
    good = next((other for other in _recorded(path.parent) if other != path and not find_damage(other)), None)
    return f"; {good} is good" if good else ""


def _load(file: BinaryFile, map_location: str | torch.device, name: str) -> dict[str, Any]:
    try:
        contents = torch.load(cast(IO[bytes], file), map_location, weights_only=True)
    except Exception as error:  # whatever the bytes of a foreign file provoke
        raise CheckpointError(
            f"{name} holds more than tensors and plain values, or is damaged ({type(error).__name__}): "
            "nothing in it was executed"
        ) from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{name} holds a {type(contents).__name__}, not a checkpoint's dict")
    version = contents.get("format", FORMAT)
    if version != FORMAT:
        raise CheckpointError(f"{name} has format {version}, this version reads format {FORMAT}: update this program")
    return contents


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if nothing can be seen: its size, its hash, its archive."""
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes)"
    record = _read_record(path.with_suffix(".json"))
    if record and record["size"] != size:
        return f"has {size:,} bytes, its record says {record['size']:,}: it was cut off or replaced"
    if record and record["sha256"] != _sha256(path):
        return f"({size:,} bytes) differs from the sha256 in its record: it was damaged or replaced"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch.save never compresses; an archive that unpacks to more than its size is no checkpoint.
            if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
                return f"({size:,} bytes) is a compressed archive, which is no checkpoint"
            broken = None if record else archive.testzip()
    except Exception as error:  # zipfile raises half a dozen kinds on damaged archives
        return f"({size:,} bytes) is no whole checkpoint file ({type(error).__name__}: {error})"
    return f"({size:,} bytes) is damaged in {broken}" if broken else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ a run's checkpoints


class AtomicCheckpointIO:
    """Lightning's CheckpointIO: every checkpoint of a run is atomic, recorded and verified.

    Lightning takes the class for one of its own after `CheckpointIO.register(AtomicCheckpointIO)`; said elsewhere, so
    that this file loads without Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        """Write the file, then its record."""
        path = Path(path)
        contents = {"format": FORMAT, **checkpoint}
        sha256, size = write_checkpoint(contents, path)
        _write_record(path, contents, sha256, size)

    def load_checkpoint(
        self, path: PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read with `weights_only=True`, whatever is asked for; onto the CPU unless said otherwise.

        Raises:
            CheckpointError: damaged, or no checkpoint of a run.
        """
        contents = read_checkpoint(path, map_location or "cpu")
        missing = {"state_dict", "transformer", "pytorch-lightning_version"} - contents.keys()
        if missing:
            raise CheckpointError(
                f"{path} was not written by `python -m lm fit`: it lacks {', '.join(sorted(missing))}"
            )
        return contents

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the record, with which the checkpoint ceases to exist, then the file."""
        Path(path).with_suffix(".json").unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Nothing is held between calls."""


def _write_record(path: Path, contents: Mapping[str, Any], sha256: str, size: int) -> None:
    record = {
        "format": FORMAT,
        "file": path.name,
        "size": size,
        "sha256": sha256,
        "step": contents.get("global_step", contents.get("iteration")),
        "metrics": {},
    }
    with atomic_write(path.with_suffix(".json"), "w") as file:
        json.dump(record, file, indent=1)


def note_metrics(path: PathLike, metrics: Mapping[str, float]) -> None:
    """Add to a checkpoint's record what was measured on its weights after it was saved.

    Raises:
        FileNotFoundError: it has no record.
    """
    place = Path(path).with_suffix(".json")
    record = _read_record(place)
    if record is None:
        raise FileNotFoundError(f"no record of a checkpoint at {place}")
    record["metrics"] = {**record.get("metrics", {}), **metrics}
    with atomic_write(place, "w") as file:
        json.dump(record, file, indent=1)


def noted_metrics(path: PathLike) -> dict[str, float]:
    """What `note_metrics` has added to a checkpoint's record."""
    return (_read_record(Path(path).with_suffix(".json")) or {}).get("metrics", {})


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
        record["size"], record["sha256"], record["step"]  # a record that lacks one is none
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def _folder(run: PathLike) -> Path:
    run = Path(run)
    return run / FOLDER if (run / FOLDER).is_dir() else run


def _recorded(folder: Path, unrecorded: bool = False) -> list[Path]:
    """The checkpoints that exist in `folder`, or lack nothing but a record, the latest step first; not yet checked."""
    found = [(path.with_suffix(".ckpt"), _read_record(path)) for path in folder.glob("*.json")]
    steps = {path: record["step"] or 0 for path, record in found if record and path.is_file()}
    if unrecorded:
        names = {path: re.fullmatch(r"step-(\d+)", path.stem) for path in _unrecorded(folder)}
        steps |= {path: int(name[1]) for path, name in names.items() if name}
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def _unrecorded(folder: Path) -> list[Path]:
    """The checkpoint files in `folder` whose process ended before it wrote their record."""
    return [path for path in folder.glob("*.ckpt") if not path.with_suffix(".json").is_file()]


def newest_checkpoint(run: PathLike, *, set_aside: bool = False, unrecorded: bool = False) -> Path:
    """The latest good checkpoint of a run directory (or of a folder of checkpoints), verified.

    Damaged ones are passed over with a line on stderr.

    Args:
        run: the directory.
        set_aside: rename damaged ones to `.bad`, as a run that resumes does; needs `lock_run`.
        unrecorded: take a whole file for one even if its process ended before it had a record, as `recover` will.

    Raises:
        FileNotFoundError: none, or none that is good (with what is wrong with them).
    """
    problems = []
    for path in _recorded(_folder(run), unrecorded):
        problem = find_damage(path)
        if problem is None:
            return path
        problems.append(f"{path} {problem}")
        if set_aside:
            path.rename(f"{path}.bad")
            with contextlib.suppress(FileNotFoundError):
                path.with_suffix(".json").rename(f"{path.with_suffix('.json')}.bad")
        print(problems[-1] + (f"; kept as {path.name}.bad" if set_aside else ""), file=sys.stderr)
    raise FileNotFoundError("; ".join(problems) or f"no checkpoint in {_folder(run)}")


def best_checkpoint(run: PathLike) -> Path:
    """The good checkpoint with the least recorded val/loss; the newest one where none was measured.

    Args:
        run: a run's folder, or one that holds runs, of which the one with the latest checkpoint counts.

    Raises:
        FileNotFoundError: none that is good.
    """
    if not _recorded(_folder(run)) and any(_runs_below(Path(run))):
        run = find_run(run)
    for path in _best_first(_folder(run)):
        if find_damage(path) is None:
            return path
    return newest_checkpoint(run)


def _best_first(folder: Path) -> list[Path]:
    losses = {}
    for path in _recorded(folder):
        if math.isfinite(loss := noted_metrics(path).get("val/loss", math.nan)):
            losses[path] = loss
    return sorted(losses, key=lambda path: losses[path])


def prune(run: PathLike, keep_last: int = 2, keep_best: int = 1) -> list[Path]:
    """Remove all checkpoints but the last and the best ones; returns what was removed."""
    folder = _folder(run)
    found = _recorded(folder)
    keep = {*found[:keep_last], *_best_first(folder)[:keep_best]}
    removed = [path for path in found if path not in keep]
    for path in removed:
        AtomicCheckpointIO().remove_checkpoint(path)
    return removed


def recover(run: PathLike) -> None:
    """Tidy up what a killed process left: unfinished parts go, a whole file without a record gets one.

    Needs `lock_run`: the parts of a process that still writes look the same.
    """
    for part in [*Path(run).glob(".*.part"), *_folder(run).glob(".*.part")]:
        part.unlink(missing_ok=True)
    for path in _unrecorded(_folder(run)):
        with contextlib.suppress(CheckpointError):
            _write_record(path, read_checkpoint(path), _sha256(path), path.stat().st_size)


def find_run(logs: PathLike = "logs") -> Path:
    """The run below `logs` with the latest checkpoint; a run that was moved away is found by a link to it.

    Raises:
        FileNotFoundError: no run has one.
    """
    records = list(_runs_below(Path(logs)))
    if not records:
        raise FileNotFoundError(f"no run with a checkpoint below {logs}: `python -m lm fit` makes one")
    return max(records, key=lambda path: path.stat().st_mtime_ns).parent.parent


def checkpoint_file(path: PathLike) -> Path:
    """A checkpoint file; of a run directory its best one.

    Raises:
        FileNotFoundError: no good checkpoint in the directory.
    """
    return best_checkpoint(path) if Path(path).is_dir() else Path(path)


def run_of(checkpoint: PathLike) -> Path:
    """The folder of the run that a checkpoint file belongs to."""
    return Path(checkpoint).resolve().parent.parent


def newest_config(run: Path) -> Path:
    """The configuration of a run as it was last gone on with; its first one, if it is there, otherwise."""
    return max(run.glob("config-resumed-*.yaml"), default=run / "config.yaml")  # they are named by the time


def _runs_below(top: Path) -> Iterator[Path]:
    """The records of all checkpoints of the runs below `top`."""
    return (record for folder in _folders_below(top) for record in (folder / FOLDER).glob("*.json"))


def _folders_below(top: Path) -> Iterator[Path]:
    """`top` and every folder below it, each once and under its own name before that of a link.

    Links are followed, except up to `top` and what it lies in: that would be a search of the whole disk.
    """
    start, seen, waiting = top.resolve(), set[Path](), [top]
    while waiting:
        for name, below, _ in os.walk(waiting.pop()):  # lists links, and does not follow them
            folder = Path(name)
            if (place := folder.resolve()) in seen:
                below.clear()
                continue
            seen.add(place)
            yield folder
            links = [link for link in map(folder.joinpath, below) if link.is_symlink()]
            waiting += [link for link in links if not start.is_relative_to(link.resolve())]


class InUseError(ValueError):
    """Another process works in a run's folder.

    Attributes:
        holder: its id and host, in words.
    """

    def __init__(self, run: PathLike, holder: str) -> None:
        super().__init__(f"{run} is in use by {holder}: wait for it, or start another run")
        self.holder = holder


def lock_run(run: PathLike) -> IO[str]:
    """Claim a run directory for this process, until the returned file is closed or the process ends.

    The kernel holds the lock, so that a killed process leaves none behind.

    Raises:
        InUseError: another process has it.
    """
    path = Path(run) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    for _ in range(50):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
        if holder.endswith("\n"):
            file.close()
            raise InUseError(run, holder.strip())
        time.sleep(0.1)  # the other has only just got it, and writes its name
    else:
        file.close()
        raise InUseError(run, "another process")
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def check_folder(folder: PathLike, num_bytes: int = 0) -> None:
    """Try out, before any work, whether files can be written to `folder` and `num_bytes` of them fit.

    Raises:
        OSError: not so, and why.
    """
    folder = Path(folder)
    probe = folder / f".probe-{os.getpid()}"
    try:
        with atomic_write(probe) as file:
            file.write(b"probe")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {folder}: {error.strerror}: choose another directory") from None
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{folder} has {free:,} bytes free, the run needs about {num_bytes:,}: make room")


# -------------------------------------------------------------------------------------------------- weights and states


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the model's own names: without what torch.compile, DDP and Lightning put in front."""
    plain = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in state.items()}
    if plain and all(name.startswith("model.") for name in plain):
        plain = {name.removeprefix("model."): tensor for name, tensor in plain.items()}
    return plain


def load_weights(model: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into `model`; names and shapes must agree.

    Raises:
        CheckpointError: they do not; with every key, both shapes and the settings to look at.
    """
    wanted, found = model.state_dict(), plain_names(state)
    wanted_names = {name.replace("_orig_mod.", ""): name for name in wanted}
    lines, settings = [], []
    for name in sorted(wanted_names.keys() | found.keys()):
        here = tuple(wanted[wanted_names[name]].shape) if name in wanted_names else None
        there = tuple(found[name].shape) if name in found else None
        if here != there:
            lines.append(f"{name}: checkpoint {there or 'lacks it'}, model {here or 'lacks it'}")
            settings += _settings_behind(name, here, there, wanted_names, found)
    if lines:
        hint = f"; look at {', '.join(dict.fromkeys(settings))}" if settings else ""
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(lines[:8])}{more}{hint}")
    model.load_state_dict({wanted_names[name]: tensor for name, tensor in found.items()})


def _settings_behind(
    name: str, here: Shape | None, there: Shape | None, wanted: Collection[str], found: Collection[str]
) -> list[str]:
    """Which fields of TransformerConfig decide whether a parameter exists (one shape is None), or what shape it has."""
    if here is None or there is None:
        layer = re.match(r"layers\.\d+\.", name)
        if layer and not all(any(other.startswith(layer[0]) for other in names) for names in (wanted, found)):
            return ["num_layers"]
        patterns = {
            r"lm_head": "head",
            r".*\bln": "norm",
            r".*\bffn\.w3": "ffn",
            r".*\b[qk]_norm": "qk_norm",
            r".*\bgate\b": "gated_attention",
            r"value_embeddings": "value_embeddings",
        }
        return [setting for pattern, setting in patterns.items() if re.match(pattern, name)]
    if re.match(r"token_embeddings|lm_head", name):
        axes = ("vocab_size", "d_model")
    elif re.search(r"ffn\.w[13]", name):
        axes = ("d_ff", "d_model")
    else:
        axes = ("d_model", "d_ff" if "ffn.w2" in name else "d_model")
    return [setting for setting, a, b in zip(axes, here, there, strict=False) if a != b]


def load_model(path: PathLike, device: str | torch.device = "cpu") -> tuple[TransformerLM, dict[str, Any]]:
    """Rebuild the model of any checkpoint of this project, in evaluation mode.

    An earlier version could average weights: then with the mean, as its val/loss is that of the mean.

    Args:
        path: a checkpoint file, or a run directory for its best one.
        device: where the weights go.

    Returns:
        The model, and what the checkpoint says about itself: "path", "step", "metrics", "transformer", "data".

    Raises:
        FileNotFoundError: no such file, or no good checkpoint in the directory.
        CheckpointError: damaged, or not a checkpoint of this project.
    """
    path = checkpoint_file(path)
    contents = read_checkpoint(path)
    state = contents.get("averaged") or contents.get("state_dict", contents.get("model"))
    if not isinstance(contents.get("transformer"), dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} has no model configuration: it was not written by this project")
    try:
        model = TransformerLM(TransformerConfig.from_saved(contents["transformer"]), device)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a model configuration that this version cannot build: {error}") from None
    load_weights(model, state, str(path))
    info = {
        "path": str(path),
        "step": contents.get("global_step", contents.get("iteration")),
        "metrics": noted_metrics(path),
        "transformer": contents["transformer"],
        "data": contents.get("TokenDataModule", {}),
    }
    return model.eval(), info


def peek(path: PathLike) -> tuple[TransformerConfig, dict[str, Any]]:
    """The model's configuration and its data's fingerprint in a checkpoint, of which no weight is read.

    Args:
        path: a checkpoint file, or a run directory for its best one.

    Raises:
        FileNotFoundError: no such file, or no good checkpoint in the directory.
        CheckpointError: damaged, or not a checkpoint of this project.
    """
    path = checkpoint_file(path)
    try:
        contents = torch.load(path, "cpu", weights_only=True, mmap=True)
        return TransformerConfig.from_saved(contents["transformer"]), contents.get("TokenDataModule", {})
    except Exception as error:  # whatever the bytes of a foreign file provoke
        check_checkpoint(path)
        raise CheckpointError(f"{path} has no model of this project: {error}") from None


def rng_state() -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's global generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    _, keys, position, has_gauss, gauss = numpy_state
    version, numbers, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(numbers), python_gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), device)
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
