"""`python -m tokenizer bench`: this tokenizer and each installed rival on the same text, on the same cores, in turn.

Every measured run is a process of its own (`tokenizer.rivals`), bound to as many cores as there are threads. Round
after round each entry of a task runs once, so that whatever else the machine does hits all alike: the claim is the
ratio to ours within a round, the seconds are what they were that day.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizer.files import END_OF_TEXT, atomic_write
from tokenizer.rivals import TASKS

THREADED_TASKS = ("count", "train", "first-use", "profile", "encode", "owt-scale", "tinystories-scale")
SCALE_BYTES = {"owt-scale": 11.9e9, "tinystories-scale": 2.2e9}
SCALE_VOCAB_SIZE = {"owt-scale": 32_000, "tinystories-scale": 10_000}
YARDSTICK = "physical limit"
RIVALS = sorted({entry for task in TASKS.values() for entry in task if not entry.startswith("ours")} - {YARDSTICK})
COMPILING = "ours, kernels compiled"

ABOUT = {
    "count": "Count the pre-tokens of the whole file. The physical limit reads the file and touches each byte once.",
    "train": "Train a vocabulary of {vocab_size:,} on the first {train_mb:g} MB, from the file to the merges.",
    "first-use": "The same training as the first work of a process: with the compiled kernels in their cache, and once "
    "without that cache, as on a new machine.",
    "profile": "Where the time of that training goes, stage by stage.",
    "encode": "Encode the whole file with the vocabulary `{tokenizer}` to uint16 on disk, flushed. "
    "`cold`: the first time in a process that has loaded vocabulary and kernels; `warm`: the second.",
    "document": "Encode one document given as a `str`, on one thread; mean processor time over documents from all over "
    "the file, of each the best of seven passes in a row, so caches are warm. `first pass`: the first of the seven, in "
    "which caches of pre-tokens know only what the documents before had.",
    "decode": "Decode the ids of one megabyte of text, given as a list, on one thread.",
    "long-run": "Encode n equal characters, on one thread. The slope is that of log time over log n from the second "
    "length to the last: 1 is linear.",
    "owt-scale": "Train a vocabulary of {vocab_size:,} on generated text, by default as large as OpenWebText and with "
    "as many distinct pre-tokens.",
    "tinystories-scale": "Train a vocabulary of {vocab_size:,} on generated text, by default as large as TinyStories.",
}

Results = dict[str, Any]
"""What `--json` holds: `machine`, and under `tasks` for each task its date, data and records."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb `bench` to `parser`."""
    installed = [name for name in RIVALS if importlib.util.find_spec(name)]
    parser.add_argument(
        "--file", type=Path, required=True, help=f"text to measure on, documents separated by {END_OF_TEXT}"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="directory of the vocabulary to encode with (GPT-2's, say); default: trained on --file",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        metavar="TASK",
        default=["count", "train", "first-use", "profile", "encode", "document", "decode", "long-run"],
        help=f"what to measure: {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=RIVALS,
        metavar="NAME",
        help=f"whom to compare with; default: {' '.join(installed) or 'nobody'}",
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=[1, len(cores())],
        help="numbers of threads; rivals run with the largest",
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds, each running every entry once")
    parser.add_argument(
        "--budget_seconds",
        type=float,
        default=60,
        help="an entry that has used this up in a task is not run again in it",
    )
    parser.add_argument("--limit_seconds", type=float, default=900, help="a single run that takes longer has failed")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="size of the vocabulary to train")
    parser.add_argument("--train_mb", type=float, default=100, help="megabytes of the file to train on")
    parser.add_argument("--scale_gb", type=float, help="size of the generated text instead of the real corpus's")
    parser.add_argument("--keep", type=Path, help="folder in which generated texts stay, to be used again")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--json", type=Path, help="write the results here; tasks of an earlier run in this file stay")
    parser.add_argument("--markdown", type=Path, help="write the page here")


# ---------------------------------------------------------------------------------------------------------- measuring


def cores() -> list[int]:
    """The processor cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def bind(chosen: list[int]) -> None:
    """Keep this process on the cores `chosen`, where the system can."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, chosen)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a process bound to `job["threads"]` cores; what it measured, or {"error": its last line}."""
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as folder:
        scratch = Path(folder)
        (scratch / "job.json").write_text(json.dumps({**job, "scratch": folder}))
        environment = {name: str(job["threads"]) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
        if job["rival"] == COMPILING:
            environment["NUMBA_CACHE_DIR"] = folder
        chosen = cores()[: job["threads"]]
        try:
            child = subprocess.run(
                [sys.executable, "-m", "tokenizer.rivals", scratch / "job.json", scratch / "result.json"],
                env={**os.environ, **environment},
                preexec_fn=lambda: bind(chosen),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=job["limit_seconds"],
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {job['limit_seconds']:g} s"}
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
            return {"error": lines[-1][:200]}
        result: dict[str, Any] = json.loads((scratch / "result.json").read_text())
        return result


def agreement(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """How far the result of a run agrees with ours: the same ids, or the same merges and tokens."""
    if theirs.get("digest"):
        return "same ids" if theirs["digest"] == ours.get("digest") else "OTHER IDS"
    if not theirs.get("tokens") and not theirs.get("merges"):
        return ""
    if theirs.get("merges"):
        if theirs["merges"] == ours["merges"]:
            return "same merges"
        pairs = zip(ours["merges"], theirs["merges"], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours["merges"]), len(theirs["merges"])))
        tokens = {left + right for left, right in theirs["merges"]}
        told = f"first {same:,} merges the same, "
    else:
        tokens, told = set(theirs["tokens"]), ""
    made = {left + right for left, right in ours["merges"]}
    return f"{told}{100 * len(made & tokens) / max(len(made), 1):.1f} % of the tokens"


def plan(task: str, threads: list[int], entries: list[str]) -> list[tuple[str, int]]:
    """What a round of a task runs, and with how many threads: the first entry with each number, the others with most.

    >>> plan("train", [1, 4], ["ours", "bpeasy"])
    [('ours', 1), ('ours', 4), ('bpeasy', 4)]
    >>> plan("count", [1, 4], ["ours", "physical limit", "regex"])
    [('ours', 1), ('ours', 4), ('physical limit', 4), ('regex', 4), ('physical limit', 1)]
    """
    first, *others = entries
    counts = [count for count in sorted(set(threads)) if task in THREADED_TASKS or count == 1]
    runs = [(first, count) for count in counts] + [(entry, counts[-1]) for entry in others]
    if YARDSTICK in others:
        runs += [(YARDSTICK, count) for count in threads if count != counts[-1]]
    return runs


@dataclasses.dataclass
class Record:
    """What the runs of one entry with one number of threads measured."""

    entry: str
    threads: int
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # of each stage, one per run
    num_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    peak_bytes: list[int] = dataclasses.field(default_factory=list)
    note: str = ""
    agreement: str = ""
    error: str = ""
    spent_seconds: float = 0.0  # on the whole processes

    def add(self, result: dict[str, Any]) -> None:
        """Take in what one more run measured."""
        for stage, seconds in result["seconds"].items():
            self.seconds.setdefault(stage, []).append(seconds)
        self.peak_bytes.append(result["peak_bytes"])
        self.num_bytes, self.note = result["num_bytes"], result["note"]

    def to_json(self) -> dict[str, Any]:
        """The record as it is kept: with an error only where there was one."""
        kept = dataclasses.asdict(self)
        del kept["spent_seconds"]
        if not self.error:
            del kept["error"]
        return kept


def run_task(
    task: str, threads: list[int], entries: list[str], job: dict[str, Any], options: argparse.Namespace
) -> Results:
    """All rounds of one task."""
    records = [Record(entry, count) for entry, count in plan(task, threads, entries)]
    ours: dict[str, Any] = {}
    for round_number in range(options.repeats):
        for record in records:
            stop = record.error or record.spent_seconds > options.budget_seconds
            if stop or (round_number > 0 and record.entry == COMPILING):
                continue
            start = time.monotonic()
            result = measure({**job, "task": task, "rival": record.entry, "threads": record.threads})
            record.spent_seconds += time.monotonic() - start
            if "error" in result:
                record.error = result["error"]
                print(f"{task}: {record.entry}: {record.error}", file=sys.stderr)
                continue
            record.add(result)
            if not ours:
                ours = result
            elif round_number == 0:
                record.agreement = agreement(task, ours, result)
            shown = ", ".join(f"{stage} {seconds:.3g} s".strip() for stage, seconds in result["seconds"].items())
            print(f"{task}: {record.entry}, {record.threads} threads: {shown}", file=sys.stderr)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": os.getloadavg()[0],
        "records": [record.to_json() for record in records],
    }


def prepare_text(task: str, options: argparse.Namespace, scratch: Path) -> Path:
    """The text of a task: the file, its first megabytes, or a generated one."""
    path = scratch / f"{task}.txt"
    if task in SCALE_BYTES:
        from tokenizer.synthetic import write_text

        num_bytes = options.scale_gb * 1e9 if options.scale_gb else SCALE_BYTES[task]
        kept = (options.keep or scratch) / f"{task}-{num_bytes / 1e9:g}GB-{options.file.stem}.txt"
        if not kept.exists():
            print(f"{task}: generating {num_bytes / 1e9:g} GB", file=sys.stderr)
            part = kept.with_suffix(".part")
            write_text(part, task, options.file, int(num_bytes), max(options.threads))
            part.rename(kept)
        return kept
    if task in ("train", "first-use", "profile") and options.file.stat().st_size > options.train_mb * 1e6:
        with open(options.file, "rb") as file:
            text = file.read(int(options.train_mb * 1e6))
        separator = text.rfind(END_OF_TEXT.encode())
        path.write_bytes(text[: separator if separator > 0 else None])
        return path
    return Path(options.file)


def prepare_tokenizer(options: argparse.Namespace, scratch: Path) -> Path:
    """The directory of the vocabulary to encode with, in every format that the rivals read."""
    from tokenizer import Tokenizer, train_bpe

    if options.tokenizer:
        tokenizer = Tokenizer.from_directory(options.tokenizer)
    else:
        vocab, merges = train_bpe(options.file, options.vocab_size, [END_OF_TEXT])
        tokenizer = Tokenizer(vocab, merges, [END_OF_TEXT])
    tokenizer.save(scratch / "tokenizer")
    return scratch / "tokenizer"


# --------------------------------------------------------------------------------------------------------- the report


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    packages = sorted({*RIVALS, "numpy", "numba"})
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": len(cores()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }


def in_units(seconds: float) -> str:
    """Seconds with three digits and a unit that suits them.

    >>> in_units(0.0000123), in_units(12.345)
    ('12.3 µs', '12.3 s')
    """
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def ratio_to_ours(record: dict[str, Any], ours: dict[str, Any] | None, stage: str) -> str:
    """Median over the rounds of their seconds over ours in the same round, for the same number of bytes."""
    own = ours["seconds"].get(stage) if ours and ours is not record else None
    if not own or stage not in record["num_bytes"]:
        return ""
    same_bytes = ours["num_bytes"][stage] / record["num_bytes"][stage] if ours else 1
    ratios = [same_bytes * a / b for a, b in zip(record["seconds"][stage], own, strict=False)]
    return f"{statistics.median(ratios):.2f}x"


def slope(record: dict[str, Any], kind: str) -> str:
    """Slope of log time over log n of the runs of one kind of letter."""
    points = [
        (record["num_bytes"][stage], statistics.median(seconds))
        for stage, seconds in record["seconds"].items()
        if stage.endswith(f" x {kind}")
    ][1:]
    if len(points) < 2:
        return ""
    from math import log

    (n0, t0), (n1, t1) = points[0], points[-1]
    return f"{kind}: slope {log(t1 / t0) / log(n1 / n0):.2f}"


def table(task: str, result: Results) -> list[str]:
    """One task as a Markdown table: median, range and rate of each stage of each entry, ratio to ours, memory."""
    lines = [
        "| entry | threads | median | range | n | MB/s | time over ours | peak MB | agrees with ours | note |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for record in result["records"]:
        if "error" in record:
            lines.append(f"| {record['entry']} | {record['threads']} | failed | | | | | | | {record['error']} |")
            continue
        same_threads = (r for r in result["records"] if r["entry"] == "ours" and r["threads"] == record["threads"])
        ours = next(same_threads, None)
        for stage, seconds in record["seconds"].items():
            median = statistics.median(seconds)
            num_bytes = record["num_bytes"].get(stage)
            cells = [
                f"{record['entry']}{', ' if stage else ''}{stage}",
                record["threads"],
                in_units(median),
                f"{in_units(min(seconds))} – {in_units(max(seconds))}",
                len(seconds),
                f"{num_bytes / median / 1e6:.3g}" if num_bytes else "",
                ratio_to_ours(record, ours, stage),
                round(max(record["peak_bytes"]) / 1e6),
                record["agreement"],
                record["note"],
            ]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    if task == "long-run":
        for record in result["records"]:
            slopes = [text for text in (slope(record, kind) for kind in ("letter", "blank")) if text]
            if "error" not in record and slopes:
                lines += ["", f"{record['entry']}: {', '.join(slopes)}."]
    ours = [record for record in result["records"] if record["entry"] == "ours" and "error" not in record]
    if len(ours) > 1:
        stage = "in all" if task == "profile" else next(iter(ours[0]["seconds"]))
        one, most = (statistics.median(record["seconds"][stage]) for record in (ours[0], ours[-1]))
        lines += ["", f"Scaling of ours from {ours[0]['threads']} to {ours[-1]['threads']} threads: {one / most:.2f}x."]
    return lines


def page(results: Results) -> str:
    """The results as a Markdown page."""
    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [
        "# Tokenizer benchmark",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, {about['system']}, "
        f"Python {about['python']}; {versions}.",
        "",
        "Every run is a process of its own bound to as many cores as threads; the entries of a task take turns, round "
        "by round. `time over ours` is the median over the rounds of their seconds per byte divided by ours in the "
        "same round: above 1, ours is faster. Peak memory is the largest resident size of the process.",
    ]
    for task, result in results["tasks"].items():
        lines += [
            "",
            f"## {task}",
            "",
            ABOUT[task].format(**result["settings"]),
            "",
            f"{result['data']}, {result['num_bytes']:,} bytes; {result['date']}; load average at the end "
            f"{result['load']:.1f}. `{result['command']}`",
            "",
            *table(task, result),
        ]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> None:
    """Measure what `options` ask for, print the page, and write it.

    Raises:
        ValueError: an option asks for what is not there.
        FileNotFoundError: the text does not exist.
    """
    if not options.file.is_file():
        raise FileNotFoundError(f"--file {options.file} does not exist")
    if options.file.stat().st_size == 0:
        raise ValueError(f"--file {options.file} is empty")
    for name in ("repeats", "vocab_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    if min(options.threads) < 1 or max(options.threads) > len(cores()):
        raise ValueError(f"--threads {options.threads} must lie between 1 and the number of cores, {len(cores())}")

    wanted = RIVALS if options.rivals is None else options.rivals
    chosen = [name for name in wanted if importlib.util.find_spec(name)]
    results: Results = {"tasks": {}}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
        if "tasks" not in results:
            raise ValueError(f"--json {options.json} is not of an earlier benchmark")
    results["machine"] = machine()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        tokenizer = prepare_tokenizer(options, scratch)
        for task in options.tasks:
            entries = [entry for entry in TASKS[task] if entry not in RIVALS or entry in chosen]
            text = prepare_text(task, options, scratch)
            vocab_size = SCALE_VOCAB_SIZE.get(task, options.vocab_size)
            job = {
                "file": str(text),
                "vocab_size": vocab_size,
                "tokenizer": str(tokenizer),
                "scratch": folder,
                "limit_seconds": options.limit_seconds,
            }
            result = run_task(task, options.threads, entries, job, options)
            name = options.tokenizer.name if options.tokenizer else "trained on the file"
            result["data"] = f"generated from {options.file.name}" if task in SCALE_BYTES else options.file.name
            result["num_bytes"] = text.stat().st_size
            result["settings"] = {"vocab_size": vocab_size, "train_mb": options.train_mb, "tokenizer": name}
            result["command"] = command(task, options)
            results["tasks"][task] = result
            if text.parent == scratch:
                text.unlink()
            if options.json:
                with atomic_write(options.json, "w") as file:
                    file.write(json.dumps(results, indent=1) + "\n")
    results["tasks"] = {task: results["tasks"][task] for task in TASKS if task in results["tasks"]}
    print(page(results))
    if options.markdown:
        with atomic_write(options.markdown, "w") as file:
            file.write(page(results))


def command(task: str, options: argparse.Namespace) -> str:
    """The command that measures one task again, with the names of files but not where they lay."""
    words = ["python -m tokenizer bench", "--tasks", task, "--file", options.file.name]
    if options.tokenizer:
        words += ["--tokenizer", options.tokenizer.name]
    words += ["--threads", *map(str, options.threads), "--repeats", str(options.repeats)]
    if task in SCALE_BYTES and options.scale_gb:
        words += ["--scale_gb", f"{options.scale_gb:g}"]
    return " ".join(words)
