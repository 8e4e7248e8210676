"""From run files to a page: table, curves against steps and wall-clock, spread over seeds.

A study is a folder of runs, `logs/<study>/**/version_k/`, each with `config.yaml`, `metrics.jsonl` and `summary.json`.
`logs/<study>/NOTES.md`, written by hand, holds the question and the answer; everything else on the page is computed
from the run files, so a page can be made anew at any time and never holds a figure that no run has.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lm.checkpoint import newest_config
from tokenizer.files import atomic_write

MAKES_RUNS = "make some with `python -m lm fit` or `python -m lm sweep`"

# Settings that say where a run lives or which random numbers it drew, not what it is.
SEED = "seed_everything"
BOOKKEEPING = (
    "data.seed",
    "data.directory",
    "data.data_dir",
    "data.tokenizer",
    "data.valid_text",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.callbacks",
    "trainer.enable",
    "run.",
)


@dataclass(frozen=True)
class Run:
    """One training run, read from its files."""

    name: str
    directory: Path
    settings: dict[str, Any]  # its newest configuration, flattened: {"model.optimizer.lr": 0.003}
    rows: list[dict[str, Any]]  # metrics.jsonl
    summary: dict[str, Any]  # summary.json; empty while the run goes on or when it was killed

    def curve(self, metric: str, against: str = "step") -> tuple[list[float], list[float]]:
        """The points (x, y) of `metric` against "step", "wall_seconds" or "tokens_seen", finite ones only."""
        points = [
            (float(row[against]), float(row[metric]))
            for row in self.rows
            if against in row and isinstance(row.get(metric), int | float) and math.isfinite(row[metric])
        ]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def final_loss(self) -> float | None:
        """The last validation loss in nats per token, None if there is none."""
        _, losses = self.curve("val/loss")
        return losses[-1] if losses else None

    @property
    def status(self) -> str:
        """What the summary says: finished, diverged, stopped, ...; "unfinished" where there is no summary."""
        return str(self.summary.get("status", "unfinished"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut in half is left out."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a row of metrics ({error})") from error
    return rows


def flatten(settings: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names.

    >>> flatten({"model": {"optimizer": {"lr": 0.1}}, "seed_everything": 0})
    {'model.optimizer.lr': 0.1, 'seed_everything': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def by_version(folders: Iterable[Path]) -> list[Path]:
    """Those of `folders` that are called `version_k`, by k; what else lies beside a run is none of its versions.

    >>> [path.name for path in by_version(map(Path, ["version_10", "version_9", "version_9-old"]))]
    ['version_9', 'version_10']
    """
    versions = [folder for folder in folders if re.fullmatch(r"version_[0-9]+", folder.name)]
    return sorted(versions, key=lambda folder: int(folder.name.removeprefix("version_")))


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a file of a run says; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        contents = parse(path.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is cut off or damaged ({str(error).splitlines()[0]}): mend it or remove it") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is damaged (no settings or figures by name): mend it or remove it")
    return contents


def find_runs(study: Path) -> list[Run]:
    """Every run below `study`, by name; of several versions of one run the newest that has metrics."""
    newest: dict[str, Run] = {}
    for directory in by_version(metrics.parent for metrics in study.rglob("version_*/metrics.jsonl")):
        name = directory.parent.relative_to(study).as_posix() if directory.parent != study else directory.name
        newest[name] = read_run(directory, name)
    return [newest[name] for name in sorted(newest)]


def read_run(directory: Path, name: str) -> Run:
    """The run in one `version_k`, as far as it has got."""
    settings = flatten(read_mapping(newest_config(directory), yaml.safe_load))
    facts = read_mapping(directory / "summary.json", json.loads)
    if "transformer.vocab_size" in facts.get("settings", {}):  # the data's; config.yaml names its folder only
        settings["data.vocab_size"] = facts["settings"]["transformer.vocab_size"]
    return Run(name, directory, settings, read_metrics(directory / "metrics.jsonl"), facts)


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """The settings that differ between `runs`, apart from the seed and from where a run is kept."""
    names = sorted({name for run in runs for name in run.settings})
    return [
        name
        for name in names
        if name != SEED and not name.startswith(BOOKKEEPING) and len({repr(run.settings.get(name)) for run in runs}) > 1
    ]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[Run]
    settings: str = ""  # those that differ from the other groups'

    @property
    def losses(self) -> list[float]:
        """Final validation losses, nats per token, of the runs that have one and did not diverge."""
        return [run.final_loss for run in self.runs if run.final_loss is not None and run.status != "diverged"]

    @property
    def mean_loss(self) -> float:
        """Mean of `losses`; infinity where every run diverged, so that it sorts last."""
        return statistics.fmean(self.losses) if self.losses else math.inf


def group_by_settings(runs: Sequence[Run]) -> list[Group]:
    """Runs with equal settings but for the seed, in groups, best mean final loss first.

    A group is called by its runs' name without the seed, as a sweep gives it, or else by the settings that differ.
    """
    varied = varied_settings(runs)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        parts = [f"{name.removeprefix('model.').removeprefix('trainer.')}={run.settings.get(name)}" for name in varied]
        stem = re.sub(r"-seed_\d+$", "", run.name)
        groups.setdefault((stem if stem != run.name else "", ", ".join(parts)), []).append(run)
    named = [
        Group(stem or settings or members[0].name, members, settings if stem else "")
        for (stem, settings), members in groups.items()
    ]
    return sorted(named, key=lambda group: (group.mean_loss, group.label))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" if line[0] != "---" else "|" + "---|" * len(line) for line in lines)


def number(value: Any, digits: int = 4) -> str:
    """A figure for a table cell; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def group_table(groups: Sequence[Group]) -> str:
    """One line per group: n, final validation loss as mean ± deviation, best, perplexity, bits per byte, wall-clock."""
    lines = []
    named = any(group.settings for group in groups)
    for group in groups:
        losses = group.losses
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        statuses = sorted({run.status for run in group.runs})
        finished = [run.curve("val/bits_per_byte")[1] for run in group.runs if run.status != "diverged"]
        bits_per_byte = [curve[-1] for curve in finished if curve]
        seconds = [run.rows[-1]["wall_seconds"] for run in group.runs if run.rows and "wall_seconds" in run.rows[-1]]
        lines.append(
            [
                f"`{group.label}`",
                *([f"`{group.settings}`" if group.settings else ""] if named else []),
                str(len(group.runs)),
                f"{group.mean_loss:.4f}{spread}" if losses else "–",
                number(min(losses, default=None)),
                number(math.exp(group.mean_loss) if losses and group.mean_loss < 50 else None, 2),
                number(statistics.fmean(bits_per_byte) if bits_per_byte else None),
                number(statistics.fmean(seconds) if seconds else None, 0),
                ", ".join(statuses),
            ]
        )
    what = ["runs", "what differs"] if named else ["setting"]
    figures = ["final val/loss (nats/token)", "best", "perplexity", "bits per byte", "wall s", "status"]
    return markdown_table([*what, "n", *figures], lines)


def run_table(runs: Sequence[Run]) -> str:
    """One line per run: seed, steps, tokens, last training loss, final validation loss, bits per byte, status."""
    lines = []
    for run in runs:
        last = run.rows[-1] if run.rows else {}
        _, train = run.curve("train/loss")
        _, bits = run.curve("val/bits_per_byte")
        lines.append(
            [
                f"`{run.name}`",
                str(run.settings.get(SEED, "–")),
                number(last.get("step")),
                number(last.get("tokens_seen")),
                number(train[-1] if train else None),
                number(run.final_loss),
                number(bits[-1] if bits else None),
                run.status,
            ]
        )
    return markdown_table(
        ["run", "seed", "steps", "tokens", "train/loss", "val/loss", "val/bits_per_byte", "status"], lines
    )


def plot_curves(groups: Sequence[Group], against: str, target: Path) -> list[Path]:
    """Validation loss (solid) and training loss (faint) of every run, one colour per group, as PNG and SVG.

    Args:
        groups: what to draw; the legend names at most the ten best.
        against: "step" or "wall_seconds".
        target: the pictures' path without an ending.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install -e '.[plots]'`).
    """
    pyplot = quiet_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, group in enumerate(groups):
        colour = f"C{index}" if index < 10 else "lightgrey"
        for position, run in enumerate(group.runs):
            name = group.label[:70] if position == 0 and index < 10 else None
            axes.plot(*run.curve("train/loss", against), color=colour, alpha=0.25, linewidth=0.8, zorder=1)
            axes.plot(*run.curve("val/loss", against), color=colour, linewidth=1.4, marker=".", label=name, zorder=2)
    axes.set_xlabel({"step": "step", "wall_seconds": "wall-clock (s)"}[against])
    axes.set_ylabel("loss (nats per token): validation solid, training faint")
    finals = [loss for group in groups for loss in group.losses]
    starts = [run.curve("val/loss")[1][0] for group in groups for run in group.runs if run.curve("val/loss")[1]]
    if finals and starts:
        low, high = min(finals), max(highest_shown(finals), statistics.median(starts))
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return save(figure, target)


def plot_final_loss(groups: Sequence[Group], setting: str, target: Path) -> list[Path]:
    """Final validation loss against a numeric setting, on a log axis, one line for each way to set the others.

    A point is the mean over seeds, its bar the range; a cross at the upper edge is a setting that always diverged.

    Args:
        groups: what to draw.
        setting: a dotted name, for example `model.optimizer.lr`.
        target: the pictures' path without an ending.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install -e '.[plots]'`).
    """
    pyplot = quiet_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines = lines_over(groups, setting)
    top = 1.02 * highest_shown([loss for group in groups for loss in group.losses])
    for index, label in enumerate(sorted(lines, key=in_numeric_order)):
        members = sorted(lines[label], key=lambda group: group.runs[0].settings[setting])
        finite = [group for group in members if group.losses]
        x = [group.runs[0].settings[setting] for group in finite]
        means = [group.mean_loss for group in finite]
        below = [group.mean_loss - min(group.losses) for group in finite]
        above = [max(group.losses) - group.mean_loss for group in finite]
        axes.errorbar(x, means, (below, above), color=f"C{index % 10}", marker=".", capsize=3, label=label or None)
        failed = [group.runs[0].settings[setting] for group in members if not group.losses]
        axes.plot(failed, [top] * len(failed), "x", color=f"C{index % 10}", markersize=9, clip_on=False)
    axes.set_xscale("log")
    axes.set_ylim(top=top)
    axes.set_xlabel(setting)
    axes.set_ylabel("final validation loss (nats per token); x: diverged")
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(fontsize="small")
    return save(figure, target)


def plot_ranking(groups: Sequence[Group], target: Path) -> list[Path]:
    """Final validation loss of each group by name, best on top: the mean over seeds, its bar the range.

    Args:
        groups: what to draw, best first; those without a finite loss are left out.
        target: the pictures' path without an ending.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install -e '.[plots]'`).
    """
    finite = [group for group in groups if group.losses]
    means = [group.mean_loss for group in finite]
    below = [group.mean_loss - min(group.losses) for group in finite]
    above = [max(group.losses) - group.mean_loss for group in finite]
    figure, axes = quiet_pyplot().subplots(figsize=(8, 1 + 0.2 * len(finite)), layout="constrained")
    axes.errorbar(means, range(len(finite)), xerr=(below, above), fmt=".", capsize=3)
    axes.set_yticks(range(len(finite)), [group.label[:40] for group in finite], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("final validation loss (nats per token)")
    axes.grid(alpha=0.3)
    return save(figure, target)


def lines_over(groups: Sequence[Group], setting: str) -> dict[str, list[Group]]:
    """The groups that differ by nothing but `setting`, under what their names have in common."""
    short = setting.split(".")[-1]
    lines: dict[str, list[Group]] = {}
    for group in groups:
        lines.setdefault(re.sub(rf"-?\b{short}_[^-]*(-\d+)?", "", group.label), []).append(group)
    return lines


def highest_shown(losses: Sequence[float]) -> float:
    """The highest of `losses` within two and a half times the lowest: one that went wrong must not squeeze the rest."""
    return max((loss for loss in losses if loss <= 2.5 * min(losses)), default=1.0)


def in_numeric_order(label: str) -> list[tuple[int, float | str]]:
    """A key that sorts batch_2 before batch_16.

    >>> sorted(["batch_16", "batch_2"], key=in_numeric_order)
    ['batch_2', 'batch_16']
    """
    return [(0, float(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", label)]


def numeric_setting(groups: Sequence[Group]) -> str | None:
    """The first setting with at least three different numbers over the groups, the learning rate before others."""
    varied = varied_settings([run for group in groups for run in group.runs])
    for name in sorted(varied, key=lambda name: name != "model.optimizer.lr"):
        values = {group.runs[0].settings.get(name) for group in groups}
        if len(values) > 2 and all(isinstance(value, int | float) and value > 0 for value in values):
            return name
    return None


def quiet_pyplot() -> Any:
    """Matplotlib without a screen; the same runs give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "lm"
    return pyplot


def save(figure: Any, target: Path) -> list[Path]:
    """Write `figure` as PNG and SVG beside each other."""
    pictures = [target.with_suffix(".png"), target.with_suffix(".svg")]
    for picture in pictures:
        figure.savefig(picture, dpi=110, metadata={"Date": None} if picture.suffix == ".svg" else None)
    quiet_pyplot().close(figure)
    return pictures


def comparison(runs: Sequence[Run]) -> str:
    """Text with a column for each run: how it ended, and the settings that differ."""
    ends = [run.rows[-1] if run.rows else {} for run in runs]
    bits = [run.curve("val/bits_per_byte")[1] for run in runs]
    lines = {
        "": [run.name for run in runs],
        "val/loss": [number(run.final_loss) for run in runs],
        "val/bits_per_byte": [number(curve[-1] if curve else None) for curve in bits],
        "steps": [number(end.get("step")) for end in ends],
        "tokens": [number(end.get("tokens_seen")) for end in ends],
        "wall s": [number(end.get("wall_seconds"), 0) for end in ends],
        "status": [run.status for run in runs],
    }
    seed = [SEED] if len({run.settings.get(SEED) for run in runs}) > 1 else []
    lines |= {name: [str(run.settings.get(name, "–")) for run in runs] for name in [*varied_settings(runs), *seed]}
    columns = [[*lines], *zip(*lines.values(), strict=True)]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def named_runs(name: str, logs: str) -> list[Run]:
    """The run in a folder, its newest version where there are several, or all the runs of a study.

    Raises:
        FileNotFoundError: no run there has metrics.
    """
    folder = find_folder(name, logs)
    versions = [folder, *by_version(folder.glob("version_*"))]
    if own := [path for path in versions if (path / "metrics.jsonl").is_file()]:
        return [read_run(own[-1], name)]
    runs = [replace(run, name=f"{name.rstrip('/')}/{run.name}") for run in find_runs(folder)]
    if not runs:
        raise FileNotFoundError(f"no runs in {folder}: {MAKES_RUNS}")
    return runs


def find_folder(name: str, logs: str) -> Path:
    """The folder of that name below `logs`, or else at that path."""
    return Path(name) if not Path(logs, name).is_dir() and Path(name).is_dir() else Path(logs, name)


def failures(study: Path, runs: Sequence[Run]) -> dict[str, str]:
    """The last words of each run of a sweep that failed and has had no result since, by its name."""
    done = {run.directory.parent for run in runs if run.status in ("finished", "diverged")}
    found = {}
    for record in sorted(study.rglob("record.json")):
        if record.parent not in done and read_mapping(record, json.loads).get("status") == "failed":
            found[record.parent.relative_to(study).as_posix()] = last_words(record.parent)
    return found


def last_words(folder: Path) -> str:
    """The last line that a run of a sweep printed."""
    output = folder / "output.txt"
    said = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    return ["it said nothing", *said.rstrip().splitlines()][-1]


def report(study: str, logs: str = "logs", against: str = "") -> None:
    """Write logs/<study>/REPORT.md and its curves from the study's run files.

    Args:
        study: the folder's name below `logs`, or a path to it.
        logs: where the studies are.
        against: runs or studies, with commas between them: nothing is written, but `study`, or the run of that name,
            is compared with them on the screen.

    Raises:
        FileNotFoundError: no run in the study's folder has metrics.
        ValueError: all have failed.
    """
    if against:
        print(comparison([run for name in (study, *against.split(",")) for run in named_runs(name, logs)]))
        return
    folder = find_folder(study, logs)
    if folder == Path(study) and folder.is_relative_to(logs):
        study = folder.relative_to(logs).as_posix()
    runs = find_runs(folder)
    failed = failures(folder, runs)
    if not runs and failed:
        raise ValueError(f"every run in {folder} failed, {' with: '.join(next(iter(failed.items())))}")
    if not runs:
        raise FileNotFoundError(f"no runs in {folder}: {MAKES_RUNS}")
    groups = group_by_settings(runs)
    notes = folder / "NOTES.md"
    lines = [notes.read_text(encoding="utf-8").rstrip()] if notes.is_file() else [f"# {study}"]
    try:
        for against, title in (("step", "steps"), ("wall_seconds", "wall-clock")):
            name = f"loss_by_{title.replace('-', '_')}"
            plot_curves(groups, against, folder / name)
            lines.append(f"![loss against {title}]({name}.png)")
        setting = numeric_setting(groups)
        num_lines = len(lines_over(groups, setting)) if setting else 0
        if num_lines > 10 or num_lines == len(groups):  # more than there are colours, or single points
            plot_ranking(groups, folder / "final_loss")
            lines.insert(1, "![final loss of each](final_loss.png)")
        elif setting is not None:
            plot_final_loss(groups, setting, folder / "final_loss")
            lines.insert(1, f"![final loss against {setting}](final_loss.png)")
    except ModuleNotFoundError:
        lines.append("(curves: `pip install -e '.[plots]'` and make this page anew)")
    lines.append(f"## Settings compared\n\n{group_table(groups)}")
    lines.append(f"## Runs\n\n{run_table(runs)}")
    if failed:
        lines.append("## Failed\n\n" + "\n".join(f"- `{name}`: {why}" for name, why in failed.items()))
    elsewhere = f" --logs {logs}" if logs != "logs" else ""
    lines.append(f"Made from the run files by `python -m lm report {study}{elsewhere}`.")
    with atomic_write(folder / "REPORT.md", "w") as file:
        file.write("\n\n".join(lines) + "\n")
    print(f"{folder / 'REPORT.md'}: {len(runs)} runs, best {groups[0].label}: {number(groups[0].mean_loss)}")
