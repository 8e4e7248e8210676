"""The words of `fit` and `validate`: their options, their help, and what is said when one is wrong."""

from argparse import Action, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lm.accounting import read_settings
from lm.options import PlainHelp, explain, fail, known_keys

SECTIONS = ("trainer", "data", "run", "model", "model.transformer", "model.optimizer", "model.schedule")

# The Trainer's options that a run is made of, in the order of the help and in this project's words.
TRAINER_OPTIONS = {
    "max_steps": "updates of the run; -1 for as many as run.max_minutes allows",
    "accumulate_grad_batches": "batches of an update",
    "gradient_clip_val": "the highest norm of all gradients together; 0 for no clipping",
    "precision": "32-true, bf16-mixed, bf16-true, or on a GPU 16-mixed",
    "accelerator": "cpu, cuda, mps, or auto for the best there is",
    "devices": "GPUs (on a CPU, processes) of each machine that take part; -1 for all GPUs",
    "num_nodes": "machines that take part, each of them started by torchrun or srun",
    "strategy": "of several devices: ddp keeps the whole model on each, fsdp2 cuts it up; auto is ddp",
    "log_every_n_steps": "updates between two rows of the log",
    "enable_progress_bar": "false for a screen without a line of progress",
    "fast_dev_run": "true tries a batch of training and one of validation, and writes nothing",
    "deterministic": "true refuses operations that differ from run to run on a GPU",
    "detect_anomaly": "true names the operation that made a NaN; slow",
    "profiler": "simple, advanced or pytorch: where the time goes, written into the run's folder",
    "callbacks": "more callbacks, by their class paths",
    "logger": "loggers in place of TensorBoard's, by their class paths",
}


DESCRIPTIONS = {
    "fit": """\
Train a model. With nothing else, a small one on the built-in corpus, for a few minutes:

  python -m lm fit
  python -m lm fit --data.train_text my.txt --run.max_minutes 10
  python -m lm fit --data.train_text notes/
  python -m lm fit --data.train_text my.txt --model.init_from logs/builtin
  python -m lm fit --config configs/owt.yaml --resume auto""",
    "validate": """\
The loss over the whole validation set, or another text: of the newest run's best checkpoint, or of another one.

  python -m lm validate
  python -m lm validate --ckpt_path logs/builtin/version_0
  python -m lm validate --data.valid_text other.txt""",
}

# The help's headings, in its order; the key is the first option of its group.
HEADINGS = {
    "ckpt_path": "a checkpoint",
    "run": "the run, how it is kept, watched and ended",
    "data": "the text and its batches",
    "model": "the model",
    "model.transformer": "the network's size and variants",
    "model.optimizer": "the optimizer",
    "model.schedule": "the learning rate over the run",
    "trainer": "Lightning's Trainer, which has more options: "
    "https://lightning.ai/docs/pytorch/stable/common/trainer.html",
}


class TrainingHelp(RawDescriptionHelpFormatter, PlainHelp):
    """The help of `fit` and `validate`: what a run is made of, in this project's words."""

    def add_argument(self, action: Action) -> None:
        """Leave out what a run seldom needs, what follows from another option, and a file for one section alone."""
        section, _, name = action.dest.partition(".")
        of_trainer = section == "trainer" and name not in TRAINER_OPTIONS
        follows = any("-->" in option for option in action.option_strings)
        if not (of_trainer or follows or action.dest in (*SECTIONS, "weights_only")):
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        section, _, name = action.dest.partition(".")
        if section == "trainer":
            return f"{TRAINER_OPTIONS[name]} (default: %(default)s)"
        if action.dest == "ckpt_path":
            return "the checkpoint to go on from, or for validate what to measure, also a run's folder (type: Path)"
        return super()._get_help_string(action)


class Parser(LightningArgumentParser):
    """Takes options by their whole names; says what is wrong in one line, with a guess at what was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=TrainingHelp, **kwargs)

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """The settings of a `--config` file.

        Raises:
            ValueError: no mapping of settings, or what is none in place of a section; names the file.
        """
        path = Path(cfg_path)
        if path.is_file():  # a pipe can be read only once
            settings = read_settings(path)
            check_sections(settings, path)
            if not settings:
                return Namespace()
        return super().parse_path(cfg_path, *args, **kwargs)

    def format_help(self, *formatter: Any) -> str:
        """The help, section by section."""
        for group in self._action_groups:
            first = group._group_actions[0].dest if group._group_actions else ""
            group.title = HEADINGS.get(first, group.title)
        rank = {title: position for position, title in enumerate(HEADINGS.values())}
        self._action_groups = sorted(self._action_groups, key=lambda group: rank.get(str(group.title), -1))
        return super().format_help(*formatter)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Print the line and leave with exit code 2."""
        fail([explain(message, known_keys(self))])


def check_sections(settings: dict[str, Any], path: Path) -> None:
    """Refuse a section of a configuration file that is none.

    Raises:
        ValueError: names the file and the section.
    """
    for name in SECTIONS:
        section: Any = settings
        for part in name.split("."):
            section = section.get(part, {})
            if not isinstance(section, dict):
                value = "empty" if section is None else repr(section)
                raise ValueError(f"{path}: `{part}` must be a mapping of settings (`name: value`), not {value}")
