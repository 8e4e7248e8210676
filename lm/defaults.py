"""What a command leaves unsaid: the configuration below all that is typed, and whose data and name it means."""

import itertools
from pathlib import Path

from jsonargparse import Namespace

from lm import default_config
from lm.accounting import read_settings
from lm.checkpoint import best_checkpoint, checkpoint_file, find_run, newest_config, run_of
from lm.options import fail
from lm.parser import DESCRIPTIONS
from lm.problems import checkpoint_problems
from lm.texts import dataset_name

TEXTS = ("corpus", "train_text", "valid_text")


def default_configs(argv: list[str]) -> dict[str, list[str]]:
    """The configuration below everything typed: the built-in corpus' for a fit, the run's own for what comes from one.

    Adds `--ckpt_path` to a `validate` without one, or with a run's folder: the best checkpoint of the newest run, or of
    that one.

    Raises:
        FileNotFoundError: nothing says what a checkpoint is to be validated with.
    """
    subcommand, logs = argv[0] if argv else "", option(argv, "--run.logs") or "logs"
    checkpoint = option(argv, "--ckpt_path")
    run = Path(checkpoint) if checkpoint and Path(checkpoint).is_dir() else None
    if subcommand == "validate" and (run or checkpoint is None) and not {"-h", "--help"} & set(argv):
        checkpoint = str(best_checkpoint(run or find_run(logs)))
        argv += ["--ckpt_path", checkpoint]  # the last one counts
    elif subcommand == "fit" and checkpoint is None and (beginning := option(argv, "--model.init_from")):
        inherited = newest_config(run_of(checkpoint_file(beginning)))
        return {subcommand: [str(inherited if inherited.is_file() else default_config())]}
    own = newest_config(run_of(checkpoint)) if checkpoint else default_config()
    configured = own.is_file() or option(argv, "--config") or option(argv, "-c")
    if subcommand == "validate" and checkpoint and Path(checkpoint).is_file() and not configured:
        if problems := checkpoint_problems(Path(checkpoint)):
            fail(problems)
        raise FileNotFoundError(f"no config.yaml beside {checkpoint}: say with --config what to validate it with")
    return {subcommand: [str(own)]} if own.is_file() and subcommand in DESCRIPTIONS else {}


def settle(config: Namespace, argv: list[str], subcommand: str) -> list[str]:
    """Settle which data and which name a command means, where a run's configuration is below it; what is wrong.

    Args:
        config: all settings, changed in place.
        argv: the command line.
        subcommand: fit or validate.
    """
    typed = {name for name in ("directory", *TEXTS) if option(argv, f"--data.{name}") is not None}
    begins = subcommand == "fit" and option(argv, "--model.init_from") is not None
    if begins:
        typed |= named_data(argv)
    problems = choose_data(config.data, typed, subcommand)
    return problems + (begin_anew(config, argv, typed) if begins else [])


def choose_data(data: Namespace, typed: set[str], subcommand: str) -> list[str]:
    """Let a text or corpus on the command line win over the dataset of a configuration file; what is wrong with it.

    Args:
        data: the section, changed in place. A run's own configuration has its dataset's directory beside its texts.
        typed: which of its keys are on the command line.
        subcommand: fit or validate, which needs no more than `valid_text`.
    """
    texts = sorted(typed & set(TEXTS))
    if not texts:
        return []
    if "directory" in typed:
        return [f"data.directory and data.{texts[0]}: one dataset is enough; leave one of them out"]
    if subcommand == "validate" and texts == ["valid_text"]:
        data.directory = data.train_text = None
    elif subcommand == "validate" and data.directory is not None:
        return [f"data.{texts[0]}: to validate on another text use --data.valid_text, encoded with the run's tokenizer"]
    elif data.directory is not None:
        data.directory = None
        for name in {"train_text", "valid_text"} - typed:
            data[name] = None
    return []


def named_data(argv: list[str]) -> set[str]:
    """Which of the texts, or else the dataset's directory, the `--config` files on a command line name."""
    files = [value for name in ("--config", "-c") for value in options(argv, name)]
    data = {name for file in files for name in read_settings(Path(file)).get("data", {})}
    return {"directory"} if "directory" in data else data & set(TEXTS)


def begin_anew(config: Namespace, argv: list[str], typed: set[str]) -> list[str]:
    """Of a run whose weights a new one begins with, take the tokenizer, leave the name behind; what is wrong.

    Args:
        config: changed in place; its other settings are that run's, where nothing else has been said.
        argv: the command line.
        typed: what of the data it names.
    """
    data, checkpoint = config.data, checkpoint_file(config.model.init_from)
    if problems := checkpoint_problems(checkpoint, "model.init_from"):
        return problems
    config.model.init_from = str(checkpoint)
    if option(argv, "--run.name") is None:
        config.run.name = None
    if data.directory is None and data.train_text is None and not typed:
        return ["model.init_from: say what to train on, for example --data.train_text my.txt"]
    if data.directory is None and option(argv, "--data.tokenizer") is None:
        data.tokenizer = str(run_of(checkpoint) / "tokenizer")
        for name in ("vocab_size", "special_tokens"):
            if option(argv, f"--data.{name}") is None:
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
