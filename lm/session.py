"""`python -m lm generate`: a prompt, a file of them, or a session in the terminal."""

import contextlib
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from lm.generate import Sample, Sampling, Timed, describe, first_text, load, sample_texts
from lm.model import TransformerLM
from lm.stops import check_stop, typed
from tokenizer import Tokenizer


def run(
    prompt: str | None = None,
    prompts: Path | None = None,
    ckpt: Path | None = None,
    tokenizer: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    top_p: float | int = 0.95,
    min_p: float | int = 0.0,
    stop: tuple[str, ...] | None = None,
    seed: int | None = None,
    num_samples: int = 1,
    interactive: bool = False,
    log_probabilities: bool = False,
    compile: bool = False,
    device: str = "auto",
    logs: Path = Path("logs"),
) -> None:
    r"""Continue a prompt with a trained model; the text goes to stdout as it comes, the speed to stderr.

    Args:
        prompt: the text to continue; left out, it is read from stdin where that is a pipe, and else empty. An empty
            prompt starts a new document.
        prompts: a file with one prompt a line, all continued together as one batch.
        ckpt: a checkpoint file or a run directory; default, the newest run. Of a run, the best checkpoint.
        tokenizer: its directory; default, the copy in the run directory.
        max_new_tokens: length of each sample, unless it ends before, with <|endoftext|> or a text of --stop.
        temperature: 0 takes the most probable token each time; higher is more varied.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the smallest set of tokens with this much of the probability.
        min_p: draw from tokens at least this many times as probable as the most probable one.
        stop: a text before which a sample ends when it has written it; again for more: --stop A --stop B. In it \n, \t
            and \\ mean a line feed, a tab and a backslash; all else is taken as it is.
        seed: same seed, same text; default, a new one each time, said on stderr.
        num_samples: several continuations, decoded together; sample i is that of seed + i.
        interactive: a session in the terminal; /help there says what it knows.
        log_probabilities: list each token with the natural logarithm of its probability instead of the text, up to the
            one that completes a text of --stop.
        compile: use torch.compile for each further token: the first takes up to a minute on a CPU.
        device: cpu, cuda, mps, ...; auto takes a CUDA GPU where there is one.
        logs: where the runs are.
    """
    seed = random.randrange(2**31) if seed is None else seed
    sampling = Sampling(temperature, top_k, top_p, min_p, max_new_tokens, seed)
    if prompts is not None and (interactive or prompt is not None):
        raise ValueError("--prompts goes with no other prompt: leave that out, and --interactive")
    if interactive and (prompt is not None or num_samples != 1 or log_probabilities):
        raise ValueError("--interactive goes with no --prompt, --num_samples or --log_probabilities: leave them out")
    stops = [typed(text) for text in stop or ()]
    check_stop(stops)
    model, loaded, info = load(ckpt, logs, tokenizer, device)
    if interactive:
        Session(model, loaded, sampling, describe(model, info), compile, stops).run()
        return
    texts = read_prompts(prompt, prompts)
    steps = Timed(sample_texts(model, loaded, texts, sampling, num_samples, compile, stops))
    if len(texts) == num_samples == 1 and not log_probabilities:
        print(texts[0], end="", flush=True)
        for piece in first_text(steps):
            print(piece, end="", flush=True)
        print()
    else:
        *_, samples = steps
        print_samples(samples, texts, loaded, seed, log_probabilities)
    print(f"{steps}, seed {seed}", file=sys.stderr)


def read_prompts(prompt: str | None, prompts: Path | None) -> list[str]:
    """The lines of the file `prompts`; without one `prompt`, or else what stdin has; arguments as of `run`.

    Raises:
        ValueError: the file is empty, or one of them is no UTF-8.
    """
    if prompts is not None:
        try:
            lines = prompts.read_text(encoding="utf-8")  # which makes every line end \n
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompts} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from None
        if not lines:
            raise ValueError(f"{prompts} is empty: write one prompt a line")
        return lines.removesuffix("\n").split("\n")  # splitlines() would cut within a prompt too, at U+2028 and others
    try:
        if prompt is None:
            prompt = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
        prompt.encode()  # of other bytes Python may have made lone surrogates
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompt is not UTF-8 at character {error.start}: convert it, e.g. with iconv") from None
    return [prompt]


def print_samples(
    samples: list[Sample], texts: list[str], tokenizer: Tokenizer, seed: int, log_probabilities: bool
) -> None:
    """Print each sample after its text, or its tokens with their probabilities; of several, say which it is."""
    num_samples = len(samples) // len(texts)
    for row, sample in enumerate(samples):
        number, i = divmod(row, num_samples)
        if len(samples) > 1:
            whose = f"prompt {number + 1}, " if len(texts) > 1 else ""
            print(f"{'' if row == 0 else chr(10)}--- {whose}sample {i + 1} (seed {seed + i})")
        if log_probabilities:
            for token_id, log_probability in zip(sample.token_ids, sample.log_probabilities, strict=True):
                print(f"{token_id}\t{log_probability:.6f}\t{tokenizer.decode([token_id])!r}")
        else:
            print(texts[number] + sample.text)


HELP = """\
Type the beginning of a text; Enter lets the model go on.
  Enter alone       goes on with the last text
  /again            the last prompt once more, with another seed
  /temperature 0.5  changes a setting; so do /top_k /top_p /min_p /max_new_tokens /seed
  /stop TEXT        ends texts before TEXT, in which \\n means a line feed, \\t a tab and \\\\ a backslash;
                    again for more, alone to forget them all
  /settings         shows them
  /help             shows this
  /quit, Ctrl-D     ends; Ctrl-C stops a text, not the session
A prompt that begins with / is typed with two: //"""


class Session:
    """Reads lines from stdin, a terminal or not; texts go to stdout, everything about them to stderr.

    Each text has a seed of its own, one more than the last.

    Args:
        model: continues the prompts.
        tokenizer: the model's.
        sampling: to begin with.
        title: said at the beginning.
        compile: use torch.compile.
        stop: strings that end a text, to begin with.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        title: str = "",
        compile: bool = False,
        stop: Sequence[str] = (),
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.title, self.compile = model, tokenizer, sampling, title, compile
        self.stop = list(stop)
        self.prompt = self.text = ""  # the last prompt, and with its continuation

    def run(self) -> None:
        """Answer lines until they end."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
        self.say(self.title)
        self.say("/help says what can be typed, Ctrl-D ends")
        while True:
            try:
                if sys.stdin is None:  # closed from the start
                    raise EOFError
                line = input("> " if sys.stdin.isatty() else "")
                if line.strip() == "/quit":
                    return
                self.answer(line)
            except EOFError:
                self.say("")
                return
            except KeyboardInterrupt:
                self.say("\nCtrl-D ends")

    def answer(self, line: str) -> None:
        """Do what one line asks for; what is wrong with it is one line on stderr."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.obey(line)
            elif line:
                self.write(line.removeprefix("/") if line.startswith("//") else line)
            else:
                self.write(self.text)
        except ValueError as error:
            self.say(str(error))

    def obey(self, line: str) -> None:
        """A line that begins with a slash."""
        name, _, value = line[1:].strip().partition(" ")
        if name == "again":
            self.write(self.prompt)
        elif name == "help":
            self.say(HELP)
        elif name == "settings":
            settings = asdict(self.sampling) | {"stop": self.stop}
            self.say(" ".join(f"{name}={value}" for name, value in settings.items()))
        elif name == "stop":
            self.stop_at([*self.stop, typed(value)] if value else [])
        elif name in asdict(self.sampling):
            self.change(name, value.strip())
        else:
            self.say(f"/{name} is not known: /help says what is")

    def change(self, name: str, value: str) -> None:
        """Set a field of `Sampling` to what was typed; `none` and `random` where they make sense."""
        changed: float | int | None
        if name == "top_k" and value in ("none", "all"):
            changed = None
        elif name == "seed" and value == "random":
            changed = random.randrange(2**31)
        else:
            whole = any(field.name == name and field.type in (int, int | None) for field in fields(Sampling))
            try:
                changed = int(value) if whole else float(value)
            except ValueError:
                raise ValueError(f"/{name} needs a {'whole ' if whole else ''}number, not {value!r}") from None
        self.sampling = replace(self.sampling, **{name: changed})  # type: ignore[arg-type]
        self.say(f"{name}={changed}")

    def stop_at(self, stop: list[str]) -> None:
        """Set the strings before which a text ends."""
        check_stop(stop)
        self.stop = stop
        self.say(f"stop={stop}")

    def write(self, prompt: str) -> None:
        """Print a prompt and its continuation as it comes, then the speed."""
        settings = self.sampling, 1, self.compile, self.stop
        steps = Timed(sample_texts(self.model, self.tokenizer, [prompt], *settings))
        self.prompt = self.text = prompt
        try:
            print(prompt, end="", flush=True)
            for piece in first_text(steps):
                self.text += piece
                print(piece, end="", flush=True)
            print(flush=True)
            self.say(f"{steps}, seed {self.sampling.seed}")
        except KeyboardInterrupt:
            print(flush=True)
            self.say(f"stopped: {steps}, seed {self.sampling.seed}")
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)

    @staticmethod
    def say(message: str) -> None:
        """Something that is no text of the model."""
        print(message, file=sys.stderr, flush=True)
