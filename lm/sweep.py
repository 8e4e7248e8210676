"""Many runs from one file: a grid over any settings, one process per run.

A sweep file (`configs/sweeps/*.yaml`) names the base configs, what varies, the seeds and the sizes it can run at:

    study: learning_rate                     # runs go to logs/<study>/<run>/
    configs: [../builtin.yaml]               # relative to this file, merged in order
    grid: {model.optimizer.lr: [1.0e-3, 3.0e-3]}
    runs:                                    # instead of a grid, or multiplied with it
      - {name: post_norm, configs: [../ablations/post_norm.yaml]}
      - {name: no_decay, settings: {model.optimizer.weight_decay: 0.0}}
      - {name: wide, scales: {cpu: {model.transformer.d_model: 256}, gpu: {model.transformer.d_model: 1024}}}
    seeds: [0, 1, 2]
    scales: {cpu: {trainer.max_steps: 300}, gpu: {configs: [../tinystories.yaml]}}
    text: stories                            # with --texts DIR: DIR/stories-train.txt and DIR/stories-valid.txt

A scale may bring its own `grid`. A run that two studies share (the base of every ablation) is made once and copied. To
run several studies one after another, a file says only `include: [learning_rate.yaml, batch_size.yaml]`.
"""

import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import yaml

from lm import default_config
from lm.checkpoint import InUseError, lock_run
from lm.report import by_version, flatten
from tokenizer.files import atomic_write

KEYS = {"study", "configs", "grid", "runs", "seeds", "scales", "text", "include"}
TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.xz")
DONE = ("finished", "diverged")  # a divergence is a result
DIVERGED_EXIT_CODE = 3


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: where it goes, and what is said on the command line."""

    study: str
    name: str
    configs: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]

    def arguments(self, logs: str) -> list[str]:
        """The command's words after `python`, complete: any scheduler can start it."""
        words = ["-m", "lm", "fit"]
        for config in self.configs:
            words += ["--config", config]
        for name, value in self.settings:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return [*words, "--run.logs", f"{logs}/{self.study}", "--run.name", self.name, "--resume", "auto"]

    @property
    def experiment(self) -> str:
        """A hash of all settings that are said anywhere; equal for runs that differ only in where they are kept."""
        merged: dict[str, Any] = {}
        for config in (str(default_config()), *self.configs):
            merged |= flatten(yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {})
        return hashlib.sha256(json.dumps(merged | dict(self.settings), sort_keys=True).encode()).hexdigest()

    def status(self, logs: str) -> str | None:
        """What the newest version's summary says, None if the run never ended by itself."""
        versions = by_version(Path(logs, self.study, self.name).glob("version_*"))
        summary = versions[-1] / "summary.json" if versions else None
        return json.loads(summary.read_text()).get("status") if summary and summary.is_file() else None


def own_texts(folder: Path, name: str) -> dict[str, str]:
    """The settings that train on `folder`/`name`-train.txt and validate on `folder`/`name`-valid.txt (or .gz, .xz).

    Raises:
        FileNotFoundError: one of them is not there.
    """
    settings = {}
    for split in ("train", "valid"):
        candidates = [folder / f"{name}-{split}{ending}" for ending in TEXT_ENDINGS]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise FileNotFoundError(f"--texts {folder}: {candidates[0].name} is not there, nor compressed (.gz, .xz)")
        settings[f"data.{split}_text"] = str(found[0])
    return settings


def plan(path: Path, scale: str | None = None, texts: Path | None = None) -> list[PlannedRun]:
    """The runs a sweep file stands for, in order.

    Args:
        path: the sweep file.
        scale: one of the file's `scales`; None takes none of them.
        texts: a folder of texts, used instead of the scale's corpus by a file that has `text`.

    Raises:
        ValueError: an unknown key or scale, or a sweep without a study; names the file.
        FileNotFoundError: a file it names is not there.
    """
    sweep = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if unknown := set(sweep) - KEYS:
        raise ValueError(f"{path}: unknown key {sorted(unknown)[0]!r}; a sweep has {', '.join(sorted(KEYS))}")
    if "include" in sweep:
        return [run for name in sweep["include"] for run in plan(path.parent / name, scale, texts)]
    if "study" not in sweep:
        raise ValueError(f"{path}: `study` is missing: the folder below logs/ that takes the runs")
    scales = sweep.get("scales", {})
    if scale is not None and scale not in scales:
        raise ValueError(f"{path}: no scale {scale!r}; it has {', '.join(scales) or 'none'}")
    size = dict(scales.get(scale, {})) if scale else {}
    bases = sweep.get("configs", []) + size.pop("configs", [])
    if texts is not None and "text" in sweep:
        size |= own_texts(texts, sweep["text"])
    grid = sweep.get("grid", {}) | size.pop("grid", {})
    varied = [[(name, value) for value in values] for name, values in grid.items()]
    runs = []
    for variant, point, seed in itertools.product(
        sweep.get("runs", [{}]), itertools.product(*varied), sweep.get("seeds", [0])
    ):
        parts = [variant["name"]] if "name" in variant else []
        parts += [f"{name.split('.')[-1]}_{value}" for name, value in point]
        own_size = dict(variant.get("scales", {}).get(scale, {}))
        files = [path.parent / name for name in [*bases, *variant.get("configs", []), *own_size.pop("configs", [])]]
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{path}: {missing[0]} is not there")
        seeds = {"seed_everything": seed, "data.seed": seed}  # weights, and order of the data
        settings = size | variant.get("settings", {}) | own_size | dict(point) | seeds
        runs.append(
            PlannedRun(
                study=sweep["study"],
                name="-".join([*parts, f"seed_{seed}"]).replace("/", "_"),
                configs=tuple(os.path.relpath(file) for file in files),
                settings=tuple(settings.items()),
            )
        )
    return runs


def execute(
    run: PlannedRun, logs: str, device: str | None, threads: int | None = None, lock: IO[str] | None = None
) -> dict[str, Any]:
    """Run one process to its end; its output goes to `output.txt` in the run's folder.

    Args:
        run: what to run.
        logs: where the studies are.
        device: the only CUDA device that the process sees; None leaves it all there are.
        threads: of the process on the CPU, unless OMP_NUM_THREADS says so already.
        lock: of the run's folder; the process holds it too, should this one be killed.

    Returns:
        The run's record: status, exit_code, seconds, command, experiment.
    """
    folder = Path(logs, run.study, run.name)
    folder.mkdir(parents=True, exist_ok=True)
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    environment |= {"CUDA_VISIBLE_DEVICES": device} if device else {}
    started = time.monotonic()
    with open(folder / "output.txt", "ab") as output:
        code = subprocess.run(
            [sys.executable, *run.arguments(logs)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[] if lock is None else [lock.fileno()],
            check=False,
        ).returncode
    status = run.status(logs) if code in (0, DIVERGED_EXIT_CODE) else "failed"
    seconds = round(time.monotonic() - started, 1)
    return {
        "status": status,
        "exit_code": code,
        "seconds": seconds,
        "command": f"python {shlex.join(run.arguments(logs))}",
        "experiment": run.experiment,
    }


def copy_twin(run: PlannedRun, logs: str) -> dict[str, Any] | None:
    """Copy the result of the same experiment from another study, without checkpoints; its record, or None."""
    for path in sorted(Path(logs).glob("*/*/record.json")):
        record = json.loads(path.read_text())
        if record.get("experiment") == run.experiment and record["status"] in DONE and "copied_from" not in record:
            source, target = path.parent, Path(logs, run.study, run.name)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints", "lock"), dirs_exist_ok=True)
            return record | {"copied_from": source.relative_to(logs).as_posix()}
    return None


def unfinished(runs: list[PlannedRun], logs: str) -> Iterator[PlannedRun]:
    """The runs that have no result yet."""
    return (run for run in runs if run.status(logs) not in DONE)


def sweep(
    file: str,
    scale: str | None = None,
    texts: Path | None = None,
    dry_run: bool = False,
    devices: str = "",
    jobs: int = 1,
    logs: str = "logs",
) -> None:
    """Run every run of a sweep file that has no result yet; a failed run is recorded and does not stop the others.

    Several sweeps may share a file and a folder: each run is made by one of them.

    Args:
        file: the sweep, for example configs/sweeps/learning_rate.yaml.
        scale: which of the file's sizes, for example cpu or gpu.
        texts: a folder of texts of your own, stories-train.txt, stories-valid.txt, web-train.txt and web-valid.txt, to
            use instead of the scale's corpora.
        dry_run: print the commands, one a line, and run nothing (for a job array).
        devices: CUDA devices to spread the runs over, "0,1,2,3"; each takes one run at a time.
        jobs: runs at the same time where no devices are named; they share the CPU's cores evenly.
        logs: where the studies go.
    """
    runs = plan(Path(file), scale, texts)
    if dry_run:
        for run in runs:
            print("python", shlex.join(run.arguments(logs)))
        return
    waiting = list(unfinished(runs, logs))
    print(f"{file}: {len(runs)} runs, {len(runs) - len(waiting)} of them done before")
    slots: SimpleQueue[str | None] = SimpleQueue()
    for device in [name.strip() for name in devices.split(",")] if devices else [None] * jobs:
        slots.put(device)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    failed = []

    def work(run: PlannedRun) -> tuple[PlannedRun, dict[str, Any] | str]:
        folder = Path(logs, run.study, run.name)
        device = slots.get()
        try:
            with lock_run(folder) as lock:
                if run.status(logs) in DONE:
                    return run, "made by another sweep meanwhile"
                record = copy_twin(run, logs) or execute(run, logs, device, threads, lock)
                with atomic_write(folder / "record.json", "w") as output:
                    json.dump(record, output, indent=1)
                return run, record
        except InUseError as error:
            return run, f"left to {error.holder}, which makes it just now"
        finally:
            slots.put(device)

    with ThreadPoolExecutor(slots.qsize()) as pool:
        for run, record in pool.map(work, waiting):
            if isinstance(record, str):
                print(f"{run.study}/{run.name}: {record}", flush=True)
                continue
            copied = f", copied from {record['copied_from']}" if "copied_from" in record else ""
            print(f"{run.study}/{run.name}: {record['status']} in {record['seconds']:.0f} s{copied}", flush=True)
            if record["status"] not in DONE:
                failed.append(run)
    if failed:
        names = ", ".join(f"{run.study}/{run.name}" for run in failed)
        raise SystemExit(
            f"{len(failed)} of {len(runs)} runs failed: {names} (see output.txt there; run again to retry)"
        )
