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

A run's folder is named after what varies, not after the scale or the texts: `record.json` there has a hash of all the
settings, by which a sweep tells its own results from those of another experiment. It never adds to the latter.
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from lm import DIVERGED_EXIT_CODE, default_config
from lm.accounting import read_settings
from lm.checkpoint import InUseError, lock_run, newest_config
from lm.report import by_version, flatten, last_words
from lm.texts import ENDINGS
from tokenizer.files import atomic_write

KINDS: dict[str, type] = {
    **{"study": str, "configs": list, "grid": dict, "runs": list, "seeds": list},
    **{"scales": dict, "text": str, "include": list},
}
RUN_KINDS: dict[str, type] = {"name": str, "configs": list, "settings": dict, "scales": dict}
KIND_NAMES: dict[type, str] = {str: "a text", list: "a list, [a, b]", dict: "a mapping, {name: value}"}
DONE = ("finished", "diverged")  # a divergence is a result
RESOLVED = ("data.vocab_size", "data.train_text", "data.valid_text")  # config.yaml has the folder made of them instead


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
    def merged(self) -> dict[str, Any]:
        """All settings that are said anywhere, by their dotted names."""
        merged: dict[str, Any] = {}
        for config in (str(default_config()), *self.configs):
            merged |= flatten(read_settings(Path(config)))
        return merged | dict(self.settings)

    @property
    def experiment(self) -> str:
        """A hash of all settings that are said anywhere; equal for runs that differ only in where they are kept."""
        return hashlib.sha256(json.dumps(self.merged, sort_keys=True).encode()).hexdigest()

    def status(self, logs: str) -> str | None:
        """What the newest version's summary says, None if the run never ended by itself."""
        versions = by_version(Path(logs, self.study, self.name).glob("version_*"))
        summary = versions[-1] / "summary.json" if versions else None
        return json.loads(summary.read_text()).get("status") if summary and summary.is_file() else None

    def meets_another(self, logs: str) -> bool:
        """Whether its folder has the result of another experiment, or a checkpoint that would be resumed from.

        A run that a job array made has no record: its config.yaml tells, though not which texts it was given.
        """
        folder = Path(logs, self.study, self.name)
        versions = by_version(folder.glob("version_*"))
        if self.status(logs) not in DONE and not any(any(path.glob("checkpoints/*")) for path in versions):
            return False
        if (folder / "record.json").is_file():
            return json.loads((folder / "record.json").read_text()).get("experiment") != self.experiment
        configs = [newest_config(path) for path in versions if newest_config(path).is_file()]
        had = flatten(read_settings(configs[-1])) if configs else {}
        said = flatten(self.merged)
        return any(not same(said[name], had[name]) for name in said.keys() & had.keys() - set(RESOLVED))


def same(said: Any, had: Any) -> bool:
    """Whether a run had the value that is said of it.

    >>> same("1e-3", 0.001), same(300, 400)  # YAML's number needs a point, the command line's does not
    (True, False)
    """
    try:
        return said == had or float(said) == float(had)
    except (TypeError, ValueError):
        return False


def check_keys(sweep: dict[str, Any], path: Path) -> None:
    """Refuse what is no sweep: a key that would be ignored, or a value of another kind.

    Raises:
        ValueError: names the file and the key.
    """

    def check(what: str, mapping: dict[str, Any], kinds: dict[str, type]) -> None:
        for key, value in mapping.items():
            if key not in kinds:
                raise ValueError(f"{path}: unknown key {key!r}; {what} has {', '.join(sorted(kinds))}")
            if not isinstance(value, kinds[key]):
                raise ValueError(f"{path}: {key} of {what} must be {KIND_NAMES[kinds[key]]}, not {value!r}")

    check("a sweep", sweep, KINDS)
    scales, runs, grid = sweep.get("scales", {}), sweep.get("runs", []), sweep.get("grid", {})
    check("scales", scales, dict.fromkeys(scales, dict))
    check("grid", grid, dict.fromkeys(grid, list))
    for name, scale in scales.items():
        check(f"scale {name}", {key: scale[key] for key in scale.keys() & KINDS.keys()}, KINDS)
        check(f"grid of scale {name}", scale.get("grid", {}), dict.fromkeys(scale.get("grid", {}), list))
    for number, run in enumerate(runs, start=1):
        check("runs", {f"number {number}": run}, {f"number {number}": dict})
        check(f"run {number}", run, RUN_KINDS)
        check(f"scales of run {number}", run.get("scales", {}), dict.fromkeys(scales, dict))


def own_texts(folder: Path, name: str) -> dict[str, str]:
    """The settings that train on `folder`/`name`-train.txt and validate on `folder`/`name`-valid.txt (.jsonl, .gz ...).

    Raises:
        FileNotFoundError: one of them is not there.
    """
    settings = {}
    for split in ("train", "valid"):
        candidates = [folder / f"{name}-{split}{ending}" for ending in ENDINGS]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise FileNotFoundError(
                f"--texts {folder}: {candidates[0].name} is not there, nor as .md, .jsonl, .gz or .xz"
            )
        settings[f"data.{split}_text"] = str(found[0])
    return settings


def plan(path: Path, scale: str | None = None, texts: Path | None = None) -> list[PlannedRun]:
    """The runs a sweep file stands for, in order.

    Args:
        path: the sweep file.
        scale: one of the file's `scales`; None takes none of them.
        texts: a folder of texts, used instead of the scale's corpus by a file that has `text`.

    Raises:
        ValueError: no YAML, no mapping, an unknown key or scale, a sweep without a study, or two runs of one name; says
            which file.
        FileNotFoundError: a file it names is not there.
    """
    runs = _plan(path, scale, texts)
    times = Counter(f"{run.study}/{run.name}" for run in runs)
    if twice := [name for name, count in times.items() if count > 1]:
        raise ValueError(f"{path}: more than one run would go to {', '.join(twice)}; give each a `name` of its own")
    return runs


def _plan(path: Path, scale: str | None, texts: Path | None) -> list[PlannedRun]:
    sweep = read_settings(path)
    check_keys(sweep, path)
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
    record = {
        "status": "started",
        "exit_code": None,
        "seconds": None,
        "command": f"python {shlex.join(run.arguments(logs))}",
        "experiment": run.experiment,
    }
    write_record(folder, record)  # should this process be killed, it still tells whose checkpoints lie there
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
    return record | {"status": status, "exit_code": code, "seconds": round(time.monotonic() - started, 1)}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """`record.json` of a run."""
    with atomic_write(folder / "record.json", "w") as output:
        json.dump(record, output, indent=1)


def copy_twin(run: PlannedRun, logs: str) -> dict[str, Any] | None:
    """Copy the result of the same experiment from another study, without checkpoints; its record, or None."""
    for path in sorted(Path(logs).glob("*/*/record.json")):
        record = json.loads(path.read_text())
        if record.get("experiment") == run.experiment and record["status"] in DONE and "copied_from" not in record:
            source, target = path.parent, Path(logs, run.study, run.name)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints", "lock"), dirs_exist_ok=True)
            return record | {"copied_from": source.relative_to(logs).as_posix()}
    return None


@dataclass(frozen=True)
class Outcome:
    """What became of a run: what is told of it, and whether it is to be run again."""

    told: str
    failed: bool


def make(run: PlannedRun, logs: str, device: str | None, threads: int | None) -> Outcome:
    """Make a run or copy it, unless another sweep does or has done meanwhile; arguments as of `execute`."""
    folder = Path(logs, run.study, run.name)
    try:
        with lock_run(folder) as lock:
            if run.meets_another(logs):
                return Outcome("another sweep has begun another experiment there meanwhile", failed=True)
            if run.status(logs) in DONE:
                return Outcome("made by another sweep meanwhile", failed=False)
            record = copy_twin(run, logs) or execute(run, logs, device, threads, lock)
            write_record(folder, record)
    except InUseError as error:
        return Outcome(f"left to {error.holder}, which makes it just now", failed=run.meets_another(logs))
    copied = f", copied from {record['copied_from']}" if "copied_from" in record else ""
    told = f"{record['status']} in {record['seconds']:.0f} s{copied}"
    if record["status"] in DONE:
        return Outcome(told, failed=False)
    return Outcome(f"{told}: {last_words(folder)}", failed=True)


def clash(runs: list[PlannedRun], logs: str, scale: str | None) -> str | None:
    """What is to be said if folders of `runs` hold other experiments; None if none does."""
    others = [run for run in runs if run.meets_another(logs)]
    if not others:
        return None
    return (
        f"{Path(logs, others[0].study, others[0].name)} holds another experiment, of another scale, texts or settings "
        f"({len(others)} of the {len(runs)} runs' folders do): give the sweep a place of its own, for example "
        f"--logs {logs.rstrip('/')}_{scale or 'new'}, or move the old one away"
    )


def refusals(runs: list[PlannedRun], logs: str) -> dict[str, list[PlannedRun]]:
    """What `fit` will refuse: each line about it, and the runs that it is said of."""
    from lm.cli import what_is_refused

    found: dict[str, list[PlannedRun]] = {}
    commands = [run.arguments(logs)[2:] for run in runs]
    for run, problems in zip(runs, what_is_refused(commands), strict=True):
        for problem in problems:
            found.setdefault(problem, []).append(run)
    return found


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

    What `fit` will refuse is said before the first run, and if that is all of them, none is run.

    Several sweeps may share a file and a folder: each run is made by one of them. A result counts only if all its
    settings are the same: where a run's folder holds another experiment (scale, texts, an edited file, the settings of
    another release), nothing is run; take another --logs then.

    Args:
        file: the sweep, for example configs/sweeps/learning_rate.yaml.
        scale: which of the file's sizes, for example cpu or gpu.
        texts: a folder of texts of your own, stories-train.txt, stories-valid.txt, web-train.txt and web-valid.txt, to
            use instead of the scale's corpora.
        dry_run: print the commands, one a line, and run nothing (for a job array).
        devices: CUDA devices to spread the runs over, "0,1,2,3"; each takes one run at a time.
        jobs: runs at the same time where no devices are named; they share the CPU's cores evenly.
        logs: where the studies go, a place of its own for each scale and each choice of texts, for example logs_gpu
            (`report` takes it, too); where a run's folder holds another experiment, nothing is run.

    Raises:
        ValueError: a run's folder holds the result of another experiment; names the first. Or `fit` refuses every run.
    """
    runs = plan(Path(file), scale, texts)
    problem = clash(runs, logs, scale)
    if problem and not dry_run:
        raise ValueError(problem)
    waiting = [run for run in runs if run.status(logs) not in DONE]
    refused = refusals(waiting, logs)
    for line in [problem] if problem else []:
        print(f"warning: {line}", file=sys.stderr)
    for line, those in refused.items():
        print(f"warning: {len(those)} of {len(runs)} runs, {those[0].name} the first: {line}", file=sys.stderr)
    if dry_run:
        for run in runs:
            print("python", shlex.join(run.arguments(logs)))
        return
    print(f"{file}: {len(runs)} runs, {len(runs) - len(waiting)} of them done before")
    hopeless = [run for those in refused.values() for run in those]
    if waiting and all(run in hopeless for run in waiting):
        raise ValueError(f"{file}: no run can be made; mend what the warnings say")
    slots: SimpleQueue[str | None] = SimpleQueue()
    for device in [name.strip() for name in devices.split(",")] if devices else [None] * jobs:
        slots.put(device)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None

    def make_in_a_slot(run: PlannedRun) -> Outcome:
        device = slots.get()
        try:
            return make(run, logs, device, threads)
        finally:
            slots.put(device)

    failed = []
    with ThreadPoolExecutor(slots.qsize()) as pool:
        for run, outcome in zip(waiting, pool.map(make_in_a_slot, waiting), strict=True):
            print(f"{run.study}/{run.name}: {outcome.told}", flush=True)
            failed += [f"{run.study}/{run.name}"] if outcome.failed else []
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)} (see output.txt there; run again to retry)"
        )
