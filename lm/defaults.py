"""What a command leaves unsaid: the configuration below all that is typed, and whose data and name it means."""

import contextlib
import itertools
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lm import default_config
from lm.accounting import read_settings
from lm.checkpoint import best_checkpoint, checkpoint_file, find_run, newest_config, peek, run_of
from lm.options import fail
from lm.parser import DESCRIPTIONS
from lm.problems import checkpoint_problems
from lm.report import flatten
from lm.texts import dataset_name

TEXTS = ("corpus", "train_text", "valid_text")

# What belongs to a run alone, and not to one that begins with its weights.
ALONE = {
    "run": ("name", "bundle"),
    "data": ("corpus", "train_text", "valid_text", "directory", "vocab_size", "special_tokens"),
    "model": ("init_from",),
}
INHERITED = "lm-inherited-"  # begins the names of files that have served once the command line is parsed


def default_configs(argv: list[str], scratch: Path | None = None) -> dict[str, list[str]]:
    """The configuration below everything typed: the built-in corpus' for a fit, the run's own for what comes from one.

    Adds `--ckpt_path` to a `validate` without one, or with a run's folder: the best checkpoint of the newest run, or of
    that one.

    Args:
        argv: the command line.
        scratch: a folder for what has to be written for that, which `discard_inherited` removes; default, the system's.

    Raises:
        FileNotFoundError: nothing says what a checkpoint is to be validated with.
        CheckpointError: a run is to begin with the weights of no checkpoint.
    """
    subcommand, logs = argv[0] if argv else "", option(argv, "--run.logs") or "logs"
    checkpoint = option(argv, "--ckpt_path")
    run = Path(checkpoint) if checkpoint and Path(checkpoint).is_dir() else None
    if subcommand == "validate" and (run or checkpoint is None) and not {"-h", "--help"} & set(argv):
        checkpoint = str(best_checkpoint(run or find_run(logs)))
        argv += ["--ckpt_path", checkpoint]  # the last one counts
    if subcommand == "fit" and checkpoint is None and (beginning := find_beginning(argv)):
        return {subcommand: [str(inherit(beginning, scratch))]}
    own = newest_config(run_of(checkpoint)) if checkpoint else default_config()
    configured = own.is_file() or option(argv, "--config") or option(argv, "-c")
    if subcommand == "validate" and checkpoint and Path(checkpoint).is_file() and not configured:
        if problems := checkpoint_problems(Path(checkpoint)):
            fail(problems)
        raise FileNotFoundError(f"no config.yaml beside {checkpoint}: say with --config what to validate it with")
    return {subcommand: [str(own)]} if own.is_file() and subcommand in DESCRIPTIONS else {}


def find_beginning(argv: list[str]) -> Path | None:
    """The checkpoint whose weights a new run is to begin with, if the command line or a `--config` names one there."""
    said: list[Any] = []
    for file in [*options(argv, "--config"), *options(argv, "-c")]:
        with contextlib.suppress(OSError, ValueError):  # which the parser will say
            said.append(flatten(read_settings(Path(file))).get("model.init_from"))
    said = [value for value in said if value is not None] + options(argv, "--model.init_from")
    if not said or said[-1] in ("", "null") or not Path(said[-1]).exists():
        return None
    checkpoint = checkpoint_file(said[-1])
    return None if checkpoint_problems(checkpoint) else checkpoint


def inherit(checkpoint: Path, scratch: Path | None) -> Path:
    """A configuration like that of a checkpoint's run, for one that begins with its weights: other data, same tokens.

    Raises:
        CheckpointError: it is none.
    """
    run = run_of(checkpoint)
    config = newest_config(run)
    settings = read_settings(config if config.is_file() else default_config())
    for section, names in ALONE.items():
        settings[section] = {name: value for name, value in settings.get(section, {}).items() if name not in names}
    network = asdict(peek(checkpoint)[0])
    del network["vocab_size"]
    settings["data"] |= {
        "context_length": network.pop("context_length"),
        "tokenizer": str(from_here(run / "tokenizer")),
    }
    settings["model"]["transformer"] = network
    descriptor, path = tempfile.mkstemp(".yaml", INHERITED, scratch)
    with open(descriptor, "w", encoding="utf-8") as file:
        yaml.safe_dump(settings, file)
    return Path(path)


def discard_inherited(defaults: dict[str, list[str]]) -> None:
    """Remove what `default_configs` had to write: after parsing, so that a run that is killed leaves nothing behind."""
    for path in map(Path, itertools.chain(*defaults.values())):
        if path.name.startswith(INHERITED):
            path.unlink(missing_ok=True)


def from_here(path: Path) -> Path:
    """A path as short as it can be written down, so that a configuration holds wherever its folder is moved."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def setting(run: Path, name: str) -> Any:
    """One of a run's settings, None where it has no configuration."""
    config = newest_config(run)
    return flatten(read_settings(config)).get(name) if config.is_file() else None


def settle(config: Namespace, argv: list[str], subcommand: str) -> list[str]:
    """Settle which data and which name a command means, where a run's configuration is below it; what is wrong.

    Args:
        config: all settings, changed in place.
        argv: the command line.
        subcommand: fit or validate.
    """
    names = ("directory", *TEXTS, "tokenizer", "special_tokens")
    typed = {name for name in names if option(argv, f"--data.{name}") is not None}
    problems = choose_data(config.data, typed, subcommand)
    if subcommand == "fit" and option(argv, "--ckpt_path") and option(argv, "--model.init_from"):
        problems.append("ckpt_path and model.init_from: a run goes on from one or begins with another; leave one out")
    elif subcommand == "fit" and config.model.init_from and config.ckpt_path is None:
        problems += settle_beginning(config, typed)
    if config.run.name is None:
        config.run.name = default_run_name(config.data)
    return problems


def settle_beginning(config: Namespace, typed: set[str]) -> list[str]:
    """Of a run that begins with the weights of another: its checkpoint and, where none are named, its data.

    A configuration file that names the built-in corpus counts as naming none. The checkpoint may be gone, where a run
    that once began with it goes on.
    """
    data, beginning = config.data, Path(config.model.init_from)
    if not beginning.exists():
        return [] if config.resume != "never" else checkpoint_problems(beginning, "model.init_from")
    checkpoint = checkpoint_file(beginning)
    if problems := checkpoint_problems(checkpoint, "model.init_from"):
        return problems
    config.model.init_from = str(checkpoint)
    if data.directory is None and data.tokenizer is None:
        data.tokenizer, data.vocab_size = str(from_here(run_of(checkpoint) / "tokenizer")), None
    named = data.directory or data.train_text or data.valid_text or data.corpus != "builtin" or "corpus" in typed
    if not named:
        data.directory = setting(run_of(checkpoint), "data.directory")
        if data.directory is None:
            return ["model.init_from: say what to train on, for example --data.train_text my.txt"]
    if data.directory is not None:
        data.tokenizer = None  # the dataset's own is compared with the checkpoint's
    return []


def choose_data(data: Namespace, typed: set[str], subcommand: str) -> list[str]:
    """Let a text or corpus on the command line win over the dataset of a configuration file; what is wrong with it.

    Args:
        data: the section, changed in place. A run's own configuration has its dataset's directory beside its texts.
        typed: which of its keys are on the command line.
        subcommand: fit or validate, which needs no more than `valid_text`.
    """
    texts = sorted(typed & set(TEXTS))
    if "directory" in typed and texts:
        return [f"data.directory and data.{texts[0]}: one dataset is enough; leave one of them out"]
    if "directory" in typed and len(typed) > 1:
        other = min(typed - {"directory"})
        return [f"data.directory and data.{other}: a prepared dataset has its own; leave one of them out"]
    if not texts:
        return []
    if subcommand == "validate" and texts == ["valid_text"]:
        data.directory = data.train_text = data.tokenizer = None
    elif subcommand == "validate" and data.directory is not None:
        return [f"data.{texts[0]}: to validate on another text use --data.valid_text, encoded with the run's tokenizer"]
    elif data.directory is not None:
        data.directory = None
        for name in {"train_text", "valid_text"} - typed:
            data[name] = None
    return []


def default_run_name(data: Namespace) -> str:
    """The name of a run's dataset."""
    if data.directory is not None:
        return Path(data.directory).name
    return data.corpus if data.train_text is None else dataset_name(data.train_text)


def option(argv: list[str], name: str) -> str | None:
    """The value of an option on the command line; given several times, the last one counts."""
    return next(reversed(options(argv, name)), None)


def options(argv: list[str], name: str) -> list[str]:
    """All values of an option on the command line, `--name value` or `--name=value`, in their order."""
    words = itertools.pairwise([*argv, ""])
    return [
        following if word == name else word.partition("=")[2]
        for word, following in words
        if word == name or word.startswith(f"{name}=")
    ]
