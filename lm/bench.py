"""How fast training and generation are, beside what one would write without this project, on any device.

- ours: this project's model, loss, clipping, AdamW and batches in a bare loop;
- ours, library attention: the same with `--model.transformer.attention fused`;
- lightning: ours under the Trainer, as `python -m lm fit` runs it;
- builtin: the same architecture from `torch.nn`, with `torch.optim.AdamW(fused=True)`, in a bare loop;
- transformers: `LlamaForCausalLM` of the same shape, otherwise like builtin, where it is installed.

`lm.measure` measures the entrants of `lm.entrants`; here is what is measured where, and the page.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lm import accounting
from lm.apart import LostError, call_apart
from lm.device import pick_device
from lm.entrants import Entrant, Setting
from lm.measure import Keep, compare_curves, compare_generation, compare_memory, compare_training, machine
from lm.model import TransformerConfig
from tokenizer.files import atomic_write

Kind = Literal["training", "curves", "memory", "generation"]
MEASURE: dict[Kind, Callable[[Setting, torch.device, list[Entrant], Keep], dict[str, Any]]] = {
    "training": compare_training,
    "curves": compare_curves,
    "memory": compare_memory,
    "generation": compare_generation,
}


@dataclass(frozen=True)
class Part:
    """Of a suite: one kind of measurement in one setting, in a process of its own."""

    kind: Kind
    setting: Setting

    @property
    def name(self) -> str:
        """In messages and for `--only`."""
        return f"{self.kind}: {self.setting.name}"


BASE = accounting.named_config("tinystories")
DEMO = TransformerConfig(2048, context_length=256, num_layers=3, num_heads=4, d_model=128, d_ff=344, head="tied")
# 50,257 rounded up to a multiple of 128, as tensor cores like it
SMALL_GPT2 = dataclasses.replace(accounting.named_config("gpt2-small"), vocab_size=50_304)
TINY = TransformerConfig(vocab_size=60, context_length=16, num_layers=2, num_heads=2, d_model=16, d_ff=32)

CPU_DEMO = Setting("demo", DEMO, 8, steps=25, rounds=7)
CPU_BASE = Setting("base", BASE, 8, steps=1, rounds=9)
GPU_BASE = Setting("base, bf16, compiled", BASE, 256, "bf16-mixed", compile=True, steps=50)
GPU_LARGE = Setting("12 x 768, context 1024, bf16, compiled", SMALL_GPT2, 32, "bf16-mixed", compile=True, steps=10)
GRAPHS = "base, bf16, compiled with CUDA graphs"
SUITES: dict[str, list[Part]] = {  # what is asked for most first
    "cpu": [
        Part("training", CPU_DEMO),
        Part("training", CPU_BASE),
        Part("generation", CPU_DEMO),
        Part("generation", CPU_BASE),
    ],
    "gpu": [
        Part("training", GPU_BASE),
        Part("training", GPU_LARGE),
        Part("curves", dataclasses.replace(GPU_BASE, batch_size=64, steps=400, rounds=3)),
        Part("memory", Setting("base", BASE, 128)),
        Part("memory", Setting("12 x 768, context 1024", SMALL_GPT2, 8)),
        Part("generation", dataclasses.replace(GPU_BASE, name="base, bf16")),
        Part("generation", dataclasses.replace(GPU_LARGE, name="12 x 768, context 1024, bf16")),
        Part("training", dataclasses.replace(GPU_BASE, name=GRAPHS, compile="reduce-overhead")),
        Part("training", Setting("base, float32", BASE, 128, steps=20)),
    ],
}


def tiny(setting: Setting, device: torch.device) -> Setting:
    """The setting, with all that takes time made small; compiled on a GPU alone, a CPU would take minutes."""
    small = dataclasses.replace(setting, model=TINY, batch_size=2, steps=2, rounds=min(2, setting.rounds))
    return small if device.type == "cuda" else dataclasses.replace(small, compile=False)


# ---------------------------------------------------------------------------------------------------------- the page


def markdown(result: dict[str, Any]) -> str:
    """The result as a section of a report."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"## Training and generation, {about['device']}", "", f"{about['threads']} threads, {versions}.", ""]
    if result["smoke"]:
        lines += ["**A trial with tiny models: no figure here means anything.**", ""]
    if result["suite"] == "gpu" and not result["smoke"]:
        lines += aims_page(result)
    pages: dict[Kind, Callable[[dict[str, Any]], list[str]]] = {
        "training": training_page,
        "curves": curves_page,
        "memory": memory_page,
        "generation": generation_page,
    }
    for kind, page in pages.items():
        for part in result[kind]:
            heading, *text = page(part)
            if "incomplete" in part:
                text = ["", f"**Incomplete: {part['incomplete']}.**", *text]
            lines += [heading, *text, ""]
    lines += [f"Not measured: {lost['name']}: {lost['error']}\n" for lost in result["failures"]]
    lines += [f"Not run yet: {name}\n" for name in result.get("not_run", [])]
    return "\n".join(lines)


def setting_text(setting: dict[str, Any]) -> str:
    """Batch and precision in words."""
    compiled = ", compiled" if setting["compile"] else ""
    tokens = f"{setting['batch_size']} x {setting['model']['context_length']} tokens"
    return f"{tokens} per step, {setting['precision']}{compiled}"


def spread(values: dict[str, float], form: str) -> str:
    """Median and range."""
    return f"{values['median']:{form}} ({values['low']:{form}}-{values['high']:{form}})"


def mebibytes(num_bytes: int) -> str:
    """In MiB."""
    return f"{num_bytes / 2**20:,.0f} MiB"


def aims_page(result: dict[str, Any]) -> list[str]:
    """Whether the project's aims for a GPU hold; one that is not measured, or not all of it, has no row."""
    rows: list[tuple[str, str, str, bool]] = []
    training = {one["name"]: one["entrants"] for one in result["training"] if "incomplete" not in one}
    for name in ("ours", "ours, library attention"):
        if base := training.get(GPU_BASE.name, {}).get(name):
            speed, ratio = base["tokens_per_second"]["median"], base["speed_relative_to_builtin"]["median"]
            rows.append(("at least 2.2 million tokens/s, base", name, f"{speed:,.0f}", speed >= 2.2e6))
            rows.append(("at least 1.2 times builtin, base", name, f"{ratio:.2f}", ratio >= 1.2))
        large = training.get(GPU_LARGE.name, {}).get(name)
        if large and large["mfu"]:
            rows.append(("at least 50 % MFU, 12 x 768", name, f"{large['mfu']:.1%}", large["mfu"] >= 0.5))
    for one in result["memory"]:
        if "incomplete" not in one:
            ratios = {name: way["measured_bytes"] / way["predicted_bytes"] for name, way in one["results"].items()}
            worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
            met = 0.9 <= ratios[worst] <= 1.1
            rows.append((f"memory within 10 % of the prediction, {one['name']}", worst, f"{ratios[worst]:.2f}", met))
    lines = [f"| {aim} | {name} | {figure} | {'met' if met else 'missed'} |" for aim, name, figure, met in sorted(rows)]
    return ["| aim | of | measured | |", "|---|---|---|---|", *lines, ""] if lines else []


def training_page(part: dict[str, Any]) -> list[str]:
    """Speed beside the rivals and the rooflines, memory, and where the time goes."""
    entrants = part["entrants"]
    ours = entrants["ours"]["tokens_per_second"]["median"]
    mixed = part["setting"]["precision"] == "bf16-mixed"
    relative = "relative to builtin*" if mixed else "relative to builtin"
    lines = [
        f"### Training: {part['name']}",
        "",
        f"{part['num_parameters']:,} parameters, {setting_text(part['setting'])}; "
        f"median of {part.get('num_rounds', part['setting']['rounds'])} rounds in turns (range). "
        f"Roofline: a large matrix product reaches {part['matmul_flops'] / 1e12:.2f} TFLOP/s here, "
        f"{part['roofline_tokens_per_second']:,.0f} tokens/s; a copy in memory moves "
        f"{part['memory_bytes_per_second'] / 1e9:,.0f} GB/s, and with what a step must move at least that is "
        f"{part['bandwidth_tokens_per_second']:,.0f} tokens/s. "
        f"The handout's 327.68 million tokens take ours {327.68e6 / ours:,.0f} s.",
        "",
        f"| | tokens/s | {relative} | ms per step | MFU | share of the roofline | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entrant in entrants.items():
        mfu = f"{entrant['mfu']:.1%}" if entrant["mfu"] else "-"
        memory = mebibytes(entrant["peak_memory_bytes"]) if "peak_memory_bytes" in entrant else "-"
        ratio = entrant.get("speed_relative_to_builtin")
        lines.append(
            f"| {name} | {spread(entrant['tokens_per_second'], ',.0f')} "
            f"| {spread(ratio, '.2f') if ratio else '-'} "
            f"| {entrant['milliseconds_per_step']:,.1f} | {mfu} | {entrant['share_of_matmul']:.0%} | {memory} |"
        )
    if mixed:
        lines += [
            "",
            "\\* At unlike precision: the residual stream of ours (lightning too) is in bfloat16, that of builtin and "
            "transformers, from the embedding on, in float32, as autocast leaves it.",
        ]
    eagerly = " (of an eager step; a compiled one needs less)" if part["setting"]["compile"] else ""
    lines += ["", f"Predicted peak memory: {mebibytes(part['predicted_memory_bytes'])}{eagerly}."]
    if overhead := part.get("lightning_overhead"):
        lines[-1] = (
            f"Lightning's loop, logging included, costs {overhead['median']:+.1%} over our bare loop "
            f"({overhead['low']:+.1%} to {overhead['high']:+.1%}). {lines[-1]}"
        )
    if names := entrants["ours"].get("parts_seconds"):
        lines += ["", f"| milliseconds of one step | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for name, entrant in entrants.items():
        if "parts_seconds" in entrant:
            parts = " | ".join(f"{1e3 * seconds:,.1f}" for seconds in entrant["parts_seconds"].values())
            lines.append(f"| {name} | {parts} |")
    return lines + [f"\nNot measured: {name}: {error}" for name, error in part["lost"].items()]


def curves_page(part: dict[str, Any]) -> list[str]:
    """How far the loss curves lie apart."""
    noise = ", ".join(f"{difference:.4f}" for difference in part["differences_of_seeds"])
    lines = [
        f"### Loss curve: {part['name']}",
        "",
        f"{part['setting']['steps']} steps, {setting_text(part['setting'])}, beside float32 run eagerly from the "
        f"same weights on the same batches of a Markov chain. Largest difference of the mean over a piece of the run: "
        f"**{part['largest_difference']:.4f}** nats; between curves in float32 from other weights: {noise or '-'}.",
        "",
    ]
    means = part["means"]
    lines += ["| piece | " + " | ".join(means) + " |", "|---" * (1 + len(means)) + "|"]
    for number, row in enumerate(zip(*means.values(), strict=True), 1):
        lines.append(f"| {number} | " + " | ".join(f"{loss:.4f}" for loss in row) + " |")
    return lines


def memory_page(part: dict[str, Any]) -> list[str]:
    """Measured beside predicted."""
    lines = [
        f"### Peak memory: {part['name']}, {part['setting']['batch_size']} sequences, eager",
        "",
        "| | measured | predicted | measured / predicted |",
        "|---|---|---|---|",
    ]
    for name, way in part["results"].items():
        measured, predicted = way["measured_bytes"], way["predicted_bytes"]
        lines.append(f"| {name} | {mebibytes(measured)} | {mebibytes(predicted)} | {measured / predicted:.2f} |")
    return lines


def generation_page(part: dict[str, Any]) -> list[str]:
    """Tokens per second."""
    lines = [f"### Generation: {part['name']}, {part['new_tokens']} tokens", ""]
    lines += ["| | tokens/s | relative to ours |", "|---|---|---|"]
    for batch, entrants in part["results"].items():
        for name, entrant in entrants.items():
            speed, ratio = entrant["tokens_per_second"], entrant["speed_relative_to_ours"]
            lines.append(f"| {name}, {batch} | {spread(speed, ',.0f')} | {spread(ratio, '.2f')} |")
    return lines


# --------------------------------------------------------------------------------------------------- what there is


def result_of(result: dict[str, Any], part: Part) -> dict[str, Any] | None:
    """The part's figures, complete or not."""
    return next((one for one in result[part.kind] if one["name"] == part.setting.name), None)


def is_done(result: dict[str, Any], part: Part) -> bool:
    """Whether all figures of the part are there."""
    found = result_of(result, part)
    return found is not None and "incomplete" not in found


def is_tried(result: dict[str, Any], part: Part) -> bool:
    """Whether the part has been begun before."""
    return result_of(result, part) is not None or any(lost["name"] == part.name for lost in result["failures"])


def put(result: dict[str, Any], part: Part, found: dict[str, Any], order: list[Part]) -> None:
    """Set the part's figures, each kind in the order of the suite; of incomplete ones those that go furthest stay."""
    result["failures"] = [lost for lost in result["failures"] if lost["name"] != part.name]
    result["not_run"] = [name for name in result["not_run"] if name != part.name]
    earlier = result_of(result, part)
    if earlier and "incomplete" in found and earlier["num_kept"] > found["num_kept"]:
        return
    if found.get("num_kept") == 0:
        result["failures"].append({"name": part.name, "error": found["incomplete"]})
        return
    there = [one for one in result[part.kind] if one is not earlier]
    names = [one.setting.name for one in order if one.kind == part.kind]
    result[part.kind] = sorted([*there, found], key=lambda one: names.index(one["name"]))


def read_earlier(path: Path, new: dict[str, Any], parts: list[Part]) -> dict[str, Any]:
    """The result in the file, to go on with.

    Args:
        path: the file.
        new: the result of this command before anything is measured.
        parts: of the whole suite, in the settings of this command.

    Raises:
        ValueError: it is no such file, or its figures would not be comparable with those of this command.
    """
    instead = "name another file, or replace it with --anew"
    try:
        result = json.loads(path.read_bytes())
        there = result["machine"] | {name: result.get(name) for name in ("suite", "smoke", "rivals")}
        settings = {(kind, one["name"]): one.get("setting") for kind in MEASURE for one in result[kind]}
        result.setdefault("not_run", [])
        result["failures"] = list(result["failures"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"json_path={path} holds no figures of this command ({error!r}): {instead}") from None
    here = new["machine"] | {name: new[name] for name in ("suite", "smoke", "rivals")}
    for name, value in here.items():
        if there.get(name) != value and name != "platform":  # another kernel's version is not another machine
            raise ValueError(f"json_path={path} has {name}={there.get(name)}, it would be {value} here: {instead}")
    ours = {(part.kind, part.setting.name): json.loads(json.dumps(dataclasses.asdict(part.setting))) for part in parts}
    for key, setting in settings.items():
        if setting != ours.get(key):
            raise ValueError(f"json_path={path} has {': '.join(key)!r} in another setting: {instead}")
    return result


def write(result: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
    """Both files."""
    if json_path is not None:
        with atomic_write(json_path, "w") as file:
            json.dump(result, file, indent=1)
    if markdown_path is not None:
        with atomic_write(markdown_path, "w") as file:
            file.write(markdown(result))


# ------------------------------------------------------------------------------------------------------- the command


def run(
    suite: Literal["auto", "cpu", "gpu"] = "auto",
    only: str | None = None,
    rivals: bool = True,
    rounds: int | None = None,
    json_path: Path | None = None,
    markdown_path: Path | None = None,
    device: str = "auto",
    max_minutes: float | int = 60,
    anew: bool = False,
    smoke: bool = False,
) -> None:
    """Measure training steps and generation beside what one would write without this project.

    Each part is a process of its own: one that fails or takes too long keeps the figures that it has, is named in the
    result and costs no other. The files are written after each part; the same command again goes on with the JSON file:
    first what has not been run, then what is incomplete or failed.

    Args:
        suite: which parts; auto takes gpu where CUDA has one. `--suite gpu` alone measures all GPU figures.
        only: the parts of this name, or if there is none, all whose name contains it; several with semicolons between.
        rivals: also transformers' Llama, where installed, beside the loop of torch built-ins.
        rounds: turns of each entrant; default, each setting's own.
        json_path: write all figures here, and go on with those that are there.
        markdown_path: write the tables here.
        device: cpu, cuda, mps, ...
        max_minutes: for everything. A part gets half of what is left of them at most, or 10 minutes if that is more;
            the last one gets all.
        anew: replace the figures in json_path.
        smoke: try every part out with tiny models, on any device, for the sake of the program alone.

    Raises:
        ValueError: no part of that name, the gpu suite without a GPU, or json_path has figures of another machine.
    """
    began = time.monotonic()
    target = pick_device(device)
    suite = ("gpu" if target.type == "cuda" else "cpu") if suite == "auto" else suite
    if suite == "gpu" and target.type != "cuda" and not smoke:
        raise ValueError("suite=gpu needs a CUDA device, none is here: use --suite cpu, or --smoke to try it out")
    order = [as_asked(part, rounds, target if smoke else None) for part in SUITES[suite]]
    parts = order if only is None else named(order, only)
    entrants: list[Entrant] = ["builtin", "ours, library attention"] if suite == "gpu" else ["builtin"]
    if rivals and importlib.util.find_spec("transformers"):
        entrants.append("transformers")
    result: dict[str, Any] = {"machine": machine(target), "suite": suite, "smoke": smoke, "rivals": entrants}
    result |= {"failures": [], "not_run": []} | {kind: [] for kind in MEASURE}
    if json_path is not None and json_path.is_file() and not anew:
        result = read_earlier(json_path, result, order)
    missing = sorted((part for part in parts if not is_done(result, part)), key=lambda part: is_tried(result, part))
    if len(missing) < len(parts):
        print(f"{json_path} has {len(parts) - len(missing)} of {len(parts)} parts", file=sys.stderr)
    untried = [part.name for part in missing if not is_tried(result, part)]
    result["not_run"] = [part.name for part in order if part.name in {*untried, *result["not_run"]}]
    for number, part in enumerate(missing, 1):
        left = 60.0 * max_minutes - (time.monotonic() - began)
        seconds = left if number == len(missing) else min(left, max(left / 2, 600.0))
        if left < min(60, 6 * max_minutes):  # a process needs seconds to start, and what is begun comes last next time
            break
        print(f"{part.name} ({number} of {len(missing)}, at most {seconds / 60:.1f} minutes) ...", file=sys.stderr)
        put(result, part, {"incomplete": "the command was ended in it", "num_kept": 0}, order)
        write(result, json_path, markdown_path)
        put(result, part, measure(part, target, entrants, seconds), order)
    write(result, json_path, markdown_path)
    print(markdown(result))
    if not any(result[kind] for kind in MEASURE):
        raise ValueError("nothing could be measured: what went wrong stands above")
    undone = [part.name for part in parts if not is_done(result, part)]
    if undone:
        again = "" if json_path is None else ": the same command again goes on with them"
        print(f"{len(undone)} of {len(parts)} parts are not done{again}", file=sys.stderr)


def named(parts: list[Part], only: str) -> list[Part]:
    """Those that `--only` asks for.

    Raises:
        ValueError: a name is in none of theirs.
    """
    wanted: set[str] = set()
    names = [part.name for part in parts]
    for word in list(filter(None, map(str.strip, only.split(";")))) or [only]:
        found = [word] if word in names else [name for name in names if word in name]
        if not found:
            raise ValueError(f"only={word!r} is in no name of: {'; '.join(names)}")
        wanted.update(found)
    return [part for part in parts if part.name in wanted]


def as_asked(part: Part, rounds: int | None, tiny_for: torch.device | None) -> Part:
    """The part in the setting of a command."""
    setting = dataclasses.replace(part.setting, rounds=rounds or part.setting.rounds)
    return Part(part.kind, tiny(setting, tiny_for) if tiny_for else setting)


def measure(part: Part, device: torch.device, entrants: list[Entrant], seconds: float) -> dict[str, Any]:
    """The part's figures; of one that was lost, those that it had sent, how many times, and what became of it."""
    so_far: list[dict[str, Any]] = [{"name": part.setting.name}]
    function, keep = MEASURE[part.kind], so_far.append
    try:
        return call_apart(function, part.setting, device, entrants, seconds=seconds, keep=keep)
    except LostError as error:
        return so_far[-1] | {"incomplete": str(error), "num_kept": len(so_far) - 1}
