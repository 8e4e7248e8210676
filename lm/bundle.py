"""What a run hands in: one folder with its loss, curve, settings, environment, description and samples.

    logs/<run>/version_k/bundle/
        README.md             the page to read: figures, rules, recipe, samples
        result.json           the same figures for a program
        learning_curve.csv    losses against steps, tokens and wall-clock; .png and .svg where matplotlib is installed
        config.yaml           `python -m lm fit --config config.yaml` is the run again
        environment.json      versions, device, cores

Everything is read from the run's files; `run.bundle` asks for it, and the run writes it when its time is over.
"""

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lm.checkpoint import load_model, newest_config
from lm.data import open_split, read_meta
from lm.generate import Sampling, ids_without_token, sample_tokens
from lm.prepare import SOURCES
from lm.report import Group, Run, number, plot_curves, read_run
from tokenizer import Tokenizer
from tokenizer.files import atomic_write

CONTEXT_LENGTH = 512  # of the validation, by the rules; the vocabulary is the handout's for OpenWebText
VOCAB_SIZE = 32_000
MINUTES = {"H100": 90, "B200": 45}  # the caps of 2025 and 2026, by a word of the device's name
OPENWEBTEXT = {split: source.text_sha256 for split, source in SOURCES["owt"].items()}

PACKAGES = ("torch", "lightning", "numpy", "numba", "regex")

# What makes a run more than the plain recipe: a setting with this value, or a number or mapping that is not empty.
RECIPE = {
    "model.transformer.ffn=relu2": "Feed-forward layers with ReLU squared instead of SwiGLU.",
    "model.transformer.head=tied": "One matrix for the token embeddings and the head.",
    "model.transformer.init=zero_output": "Zeros at first in the last matrix of each sub-layer and in an untied head.",
    "model.transformer.qk_norm=True": "RMSNorm on the queries and keys of each head.",
    "model.transformer.gated_attention=True": "Each head's output is multiplied by a gate on the layer's input.",
    "model.transformer.value_embeddings=True": "Every other layer adds an embedding of the token to its values.",
    "model.optimizer.matrices=muon": "Muon moves the blocks' matrices, AdamW everything else.",
    "model.schedule.shape=trapezoid": "The learning rate stays high, then falls in a straight line.",
    "model.schedule.context_lengths": "The context grows over the run: {} (percentage of the run: tokens).",
    "data.windows=epoch": "Windows are drawn without replacement.",
}


def write_bundle(directory: Path, data_directory: Path, device: str) -> Path:
    """Write the folder; its path.

    Args:
        directory: of a run that has finished.
        data_directory: of its dataset.
        device: what it ran on, as it calls itself.
    """
    folder = directory / "bundle"
    folder.mkdir(exist_ok=True)
    run = read_run(directory, directory.parent.name)
    meta = read_meta(data_directory)
    environment = describe_environment(device)
    result = describe_result(run, meta, environment)
    shutil.copyfile(newest_config(directory), folder / "config.yaml")
    for name, contents in (("environment", environment), ("result", result)):
        with atomic_write(folder / f"{name}.json", "w") as file:
            json.dump(contents, file, indent=1)
    write_curve(run, folder / "learning_curve.csv")
    pictures: list[Path] = []
    with contextlib.suppress(ModuleNotFoundError):  # without matplotlib the figures are in the .csv
        pictures = plot_curves([Group(run.name, [run])], "wall_seconds", folder / "learning_curve")
    samples = decode_samples(
        Path(run.summary["checkpoint"]), directory, data_directory, int(result["val_context_length"])
    )
    with atomic_write(folder / "README.md", "w") as file:
        file.write(page(run, result, environment, samples, bool(pictures)))
    return folder


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, device and cores."""
    return {
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
    } | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_result(run: Run, meta: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The figures, and in what the run differs from the leaderboard's rules."""
    summary, settings = run.summary, run.settings
    cap = summary["budget_seconds"]
    context = settings.get("data.val_context_length") or settings["data.context_length"]
    allowed = next((minutes for word, minutes in MINUTES.items() if word in environment["device"].split()), None)
    deviations = []
    if any(meta["splits"].get(name, {}).get("text_sha256") != text for name, text in OPENWEBTEXT.items()):
        data = settings.get("data.train_text") or settings.get("data.directory") or settings["data.corpus"]
        deviations.append(f"the data is {data}, not OpenWebText")
    if meta["vocab_size"] != VOCAB_SIZE:
        deviations.append(f"the vocabulary has {meta['vocab_size']:,} tokens, not {VOCAB_SIZE:,}")
    if context != CONTEXT_LENGTH:
        deviations.append(f"the validation context is {context}, not {CONTEXT_LENGTH}")
    if (devices := summary["settings"]["world_size"]) != 1:
        deviations.append(f"{devices} devices, not one")
    if allowed is None:
        deviations.append(f"the device is {environment['device']}, not one of {', '.join(MINUTES)}")
    elif cap is None or cap > 60 * allowed:
        deviations.append(f"more than {allowed} minutes")
    return {
        "val_loss": summary["val_loss"],
        "val_perplexity": summary["validation"].get("val/perplexity"),
        "val_bits_per_byte": summary["validation"].get("val/bits_per_byte"),
        "val_tokens": meta["splits"]["valid"]["num_tokens"] - 1,
        "val_context_length": context,
        "seconds": summary["used_seconds"],
        "cap_seconds": cap,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "parameters": summary["parameters"],
        "deviations": deviations,
    }


def write_curve(run: Run, path: Path) -> None:
    """Every logged loss: seconds of wall-clock, step, tokens seen, training or validation loss in nats per token."""
    columns = ["wall_seconds", "step", "tokens_seen", "train/loss", "val/loss"]
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row.get(name, "") for name in columns] for row in run.rows)


def decode_samples(
    checkpoint: Path, directory: Path, data_directory: Path, context_length: int, count: int = 4, length: int = 96
) -> list[tuple[str, str, str]]:
    """Windows spread over the validation text: how each begins, how the model goes on, how the text does."""
    model, _ = load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_directory(directory / "tokenizer")
    tokens = open_split(data_directory, "valid")
    begin = max(1, min(context_length, model.config.context_length) // 2)
    length = min(length, begin)
    samples = []
    for index in range(count):
        start = index * max(0, len(tokens) - begin - length) // count
        prompt = tokens[start : start + begin].tolist()
        sampling = Sampling(0.8, top_p=0.95, max_new_tokens=length, seed=index)
        *_, [sample] = sample_tokens(model, prompt, sampling, barred_ids=ids_without_token(model, tokenizer))
        truth = tokens[start + begin : start + begin + length].tolist()
        samples.append((tokenizer.decode(prompt), tokenizer.decode(sample.token_ids), tokenizer.decode(truth)))
    return samples


def recipe(config: dict[str, Any]) -> list[str]:
    """What a run's configuration does beyond a plain Transformer with AdamW, a sentence each."""
    sentences = []
    for key, sentence in RECIPE.items():
        name, _, wanted = key.partition("=")
        value: Any = config
        for part in name.split("."):
            value = (value or {}).get(part)
        if str(value) == wanted if wanted else value:
            sentences.append(sentence.format(value))
    return sentences


def page(
    run: Run,
    result: dict[str, Any],
    environment: dict[str, Any],
    samples: Sequence[tuple[str, str, str]],
    has_pictures: bool,
) -> str:
    """README.md."""
    sentences = recipe(yaml.safe_load(newest_config(run.directory).read_text()))
    rules = "Measured under the leaderboard's limits"
    if result["deviations"]:
        rules += f", but as a rehearsal: {'; '.join(result['deviations'])}"
    cap = "no cap" if result["cap_seconds"] is None else f"a cap of {result['cap_seconds'] / 60:g} minutes"
    sizes = [run.settings[f"model.transformer.{name}"] for name in ("num_layers", "d_model", "num_heads", "d_ff")]
    kept = "All settings are in config.yaml."
    if newest_config(run.directory).name != "config.yaml":
        kept = "The run went on with other settings than it had begun with; config.yaml has the last ones."
    lines = [
        f"# {run.name}: {number(result['val_loss'])} nats per token",
        f"{rules}.",
        "\n".join(
            [
                f"- validation loss {number(result['val_loss'])} nats per token over the whole set of "
                f"{result['val_tokens']:,} tokens, context {result['val_context_length']}; perplexity "
                f"{number(result['val_perplexity'], 2)}, {number(result['val_bits_per_byte'])} bits per byte",
                f"- {result['seconds'] / 60:.1f} minutes from the start of the process to its end, start-up, "
                f"compilation and validations included, under {cap}",
                f"- {environment['device']}, {environment['cores']} cores, torch {environment['torch']}, "
                f"Python {environment['python']}",
                f"- {result['steps']:,} steps, {result['tokens']:,} tokens, {result['parameters']:,} parameters",
            ]
        ),
        "## Learning curve",
        "![loss against wall-clock](learning_curve.png)" if has_pictures else "In learning_curve.csv.",
        "## Recipe",
        "A Transformer of {} layers, d_model {}, {} heads, d_ff {}, ".format(*sizes)
        + f"context {run.settings['data.context_length']}; "
        f"learning rate {run.settings['model.optimizer.lr']}, batches of {run.settings['data.batch_size']} windows per "
        f"device. {kept} Beyond the plain recipe:",
        "\n".join(f"- {sentence}" for sentence in sentences) or "- nothing",
        "## Samples",
        "How a window of the validation text begins, how the model goes on (temperature 0.8, top-p 0.95), and how the "
        "text does.",
    ]
    for prompt, continuation, truth in samples:
        parts = [("text", prompt), ("model", continuation), ("text goes on", truth)]
        lines += [f"**{title}**\n\n{quoted(part)}" for title, part in parts]
        lines.append("---")
    return "\n\n".join(lines[:-1] if samples else lines) + "\n"


def quoted(text: str) -> str:
    """A text as an indented block, which Markdown leaves alone."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "
