"""Decoding: a prompt in, text out, one token at a time.

The model sees a window of at most `context_length` tokens. While the text fits, each new token costs one position: keys
and values of the others stand in the KV cache. When the window is full its start moves forward by a quarter of
`context_length` and the rest is encoded anew, so that every token is predicted from at least three quarters of the
context length, each at a position the model was trained at. (Dropping the oldest keys alone would be cheaper, but
text degrades when the first positions leave the cache: Xiao et al. 2023, "Efficient streaming language models with
attention sinks".) `window_start` is the whole rule, for prompts that are too long as well.
"""

import contextlib
import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm.functional import softmax
from lm.model import KVCache, TransformerLM
from tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's distribution.

    The logits are divided by `temperature` first; then the filters apply in the order of the fields, and what is left
    is normalised again.

    Args:
        temperature: 0 takes the most probable token (greedy); 1 is the model's own distribution.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of most probable tokens with at least this mass (Holtzman et al. 2020, nucleus
            sampling; CS336 A1 section 6).
        min_p: keep tokens at least this many times as probable as the most probable one (Nguyen et al. 2024).

    Raises:
        ValueError: a setting is out of its range.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int = 1.0
    min_p: float | int = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a number >= 0: 0 is greedy, 1 the model's own")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1: leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]: 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]: 0 keeps all tokens")

    def probabilities(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """The distribution, in float32, that the next token is drawn from."""
        logits = logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        # Minus the maximum first: a tiny temperature must not turn large logits into infinities.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:
            return softmax(logits, dim=-1)
        # Stable: among equal logits the smaller token ids stay.
        logits, token_ids = logits.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            logits[..., self.top_k :] = -math.inf
        if self.top_p < 1:
            probabilities = softmax(logits, dim=-1)
            mass_before = probabilities.cumsum(dim=-1) - probabilities
            logits = logits.masked_fill(mass_before >= self.top_p, -math.inf)
        if self.min_p > 0:
            logits = logits.masked_fill(logits < math.log(self.min_p), -math.inf)  # the greatest logit is 0
        return torch.zeros_like(logits).scatter_(-1, token_ids, softmax(logits, dim=-1))


def window_start(num_tokens: int, context_length: int) -> int:
    """Where the model's window begins in a text of `num_tokens`: 0, or a multiple of a quarter of `context_length`.

    >>> [window_start(n, context_length=8) for n in (1, 8, 9, 10, 11, 12, 13)]
    [0, 0, 2, 2, 4, 4, 6]
    """
    stride = max(1, context_length // 4)
    return max(0, -(-(num_tokens - context_length) // stride) * stride)


class Decoder:
    """The logits after a batch of growing texts of equal length, with a KV cache."""

    def __init__(self, model: TransformerLM, batch_size: int = 1) -> None:
        self._model = model
        self._batch_size = batch_size
        self._cache: KVCache | None = None
        self._start = self._end = 0  # the cache holds the tokens [start, end) of the text

    @torch.inference_mode()
    def next_logits(self, token_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
        """Logits of the token after `token_ids`, the whole text so far: that of the last call and what came since."""
        context_length = self._model.config.context_length
        num_tokens = token_ids.shape[1]
        start = window_start(num_tokens, context_length)
        if self._cache is None or start != self._start:
            self._cache = self._model.make_cache(self._batch_size, context_length)
            self._start = self._end = start
        new = token_ids[:, self._end :]
        self._end = num_tokens
        # forward, not __call__: a model compiled for training would be compiled again for each length
        return self._model.forward(new, cache=self._cache)[:, -1]


@dataclass
class Sample:
    """One continuation of the prompt; `finished` when it ended itself with `<|endoftext|>`, which is not in it."""

    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finished: bool = False


def sample_tokens(
    model: TransformerLM,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    num_samples: int = 1,
    stop_id: int | None = None,
) -> Iterator[list[Sample]]:
    """Continue a prompt; after each step, the samples as they stand (the same objects, grown by up to one token each).

    Sample i draws from its own generator, seeded with `seed + i`: it does not depend on how many others there are.

    Args:
        model: decoded as it is, on the device where it is.
        prompt_ids: at least one token; of a prompt longer than the context the model sees the end (`window_start`).
        max_new_tokens: an upper bound per sample.
        sampling: default, the model's own distribution.
        seed: of the first sample.
        num_samples: decoded together as one batch.
        stop_id: the token that ends a sample; default, none.

    Raises:
        ValueError: the prompt is empty or has ids beyond the vocabulary, or a number is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if not prompt_ids:
        raise ValueError("prompt_ids is empty: start with the token of <|endoftext|>")
    if max(prompt_ids) >= model.config.vocab_size or min(prompt_ids) < 0:
        raise ValueError(
            f"prompt_ids has id {max(prompt_ids)}, but vocab_size={model.config.vocab_size}: is it another tokenizer's?"
        )
    return _steps(model, prompt_ids, max_new_tokens, sampling or Sampling(), seed, num_samples, stop_id)


def _steps(
    model: TransformerLM,
    prompt_ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    num_samples: int,
    stop_id: int | None,
) -> Iterator[list[Sample]]:
    device = model.token_embeddings.weight.device
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(num_samples)]
    samples = [Sample() for _ in range(num_samples)]
    decoder = Decoder(model, num_samples)
    text = torch.empty(num_samples, len(prompt_ids) + max_new_tokens, dtype=torch.int64, device=device)
    text[:, : len(prompt_ids)] = torch.tensor(prompt_ids, device=device)
    for end in range(len(prompt_ids), text.shape[1]):
        logits = decoder.next_logits(text[:, :end]).float()
        probabilities = sampling.probabilities(logits)
        drawn = torch.cat(
            [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
        )
        text[:, end] = drawn
        log_probabilities = logits.gather(-1, drawn[:, None])[:, 0] - logits.logsumexp(dim=-1)
        for sample, token_id, log_probability in zip(samples, drawn.tolist(), log_probabilities.tolist(), strict=True):
            if token_id == stop_id:
                sample.finished = True
            elif not sample.finished:
                sample.token_ids.append(token_id)
                sample.log_probabilities.append(log_probability)
        yield samples
        if all(sample.finished for sample in samples):
            return


# -------------------------------------------------------------------------------------------------------------- text


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], int | None]:
    """The ids of `prompt` and the id of `<|endoftext|>`, None where the tokenizer has none.

    An empty prompt becomes `<|endoftext|>`: what stands before the first token of a document.

    Raises:
        ValueError: the prompt is empty and there is no `<|endoftext|>`.
    """
    stop_id = tokenizer.encode(END_OF_TEXT)[0] if END_OF_TEXT in tokenizer.special_tokens else None
    if prompt:
        return tokenizer.encode(prompt), stop_id
    if stop_id is None:
        raise ValueError(f"prompt is empty and the tokenizer has no {END_OF_TEXT} to start from: give a prompt")
    return [stop_id], stop_id


def stream(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 256,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of `prompt`, in pieces of whole characters as they come.

    Args and errors: as for `Sampling`, `sample_tokens` and `encode_prompt`.
    """
    prompt_ids, stop_id = encode_prompt(tokenizer, prompt)
    steps = sample_tokens(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        stop_id=stop_id,
    )
    return tokenizer.decode_stream(sample.token_ids[-1] for [sample] in steps if not sample.finished)


def generate(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 256,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
    seed: int = 0,
    num_samples: int = 1,
) -> list[str]:
    """`num_samples` continuations of `prompt`, decoded together; sample i is that of `seed + i` alone.

    Args and errors: as for `Sampling`, `sample_tokens` and `encode_prompt`.
    """
    prompt_ids, stop_id = encode_prompt(tokenizer, prompt)
    *_, samples = sample_tokens(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        num_samples=num_samples,
        stop_id=stop_id,
    )
    return [tokenizer.decode(sample.token_ids) for sample in samples]


# --------------------------------------------------------------------------------------------------- the command


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU where there is one.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device={name}: this machine has none of that name; use cpu or auto") from None
    return device


def load(
    ckpt: Path | None, logs: Path, tokenizer: Path | None, device: str
) -> tuple[TransformerLM, Tokenizer, dict[str, Any]]:
    """The model of a checkpoint (default: the best one of the newest run below `logs`), its run's tokenizer, its facts.

    Raises:
        FileNotFoundError: no run, no checkpoint, or no tokenizer beside it.
        ValueError: the tokenizer has another number of tokens than the model.
    """
    from lm.checkpoint import find_run, load_model

    target = pick_device(device)
    model, info = load_model(find_run(logs) if ckpt is None else ckpt, target)
    directory = Path(info["path"]).parent.parent / "tokenizer" if tokenizer is None else tokenizer
    if not directory.is_dir():
        raise FileNotFoundError(f"no tokenizer at {directory}: name its directory with --tokenizer")
    loaded = Tokenizer.from_directory(directory)
    if loaded.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{directory} has vocab_size={loaded.vocab_size}, the model of {info['path']} {model.config.vocab_size}: "
            "it was trained with another tokenizer"
        )
    return model, loaded, info


def run(
    prompt: str | None = None,
    ckpt: Path | None = None,
    tokenizer: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    top_p: float | int = 0.95,
    min_p: float | int = 0.0,
    seed: int | None = None,
    num_samples: int = 1,
    interactive: bool = False,
    log_probabilities: bool = False,
    device: str = "auto",
    logs: Path = Path("logs"),
) -> None:
    """Continue a prompt with a trained model; the text goes to stdout as it comes, the speed to stderr.

    Args:
        prompt: the text to continue; left out, it is read from stdin where that is a pipe, and else empty. An empty
            prompt starts a new document.
        ckpt: a checkpoint file or a run directory; default, the newest run. Of a run, the best checkpoint.
        tokenizer: its directory; default, the copy in the run directory.
        max_new_tokens: length of each sample, unless it ends itself with <|endoftext|>.
        temperature: 0 takes the most probable token each time; higher is more varied.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the smallest set of tokens with this much of the probability.
        min_p: draw from tokens at least this many times as probable as the most probable one.
        seed: same seed, same text; default, a new one each time, said on stderr.
        num_samples: several continuations, decoded together; sample i is that of seed + i.
        interactive: a session in the terminal.
        log_probabilities: list each token with the natural logarithm of its probability instead of the text.
        device: cpu, cuda, mps, ...; auto takes a GPU where there is one.
        logs: where the runs are.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    seed = random.randrange(2**31) if seed is None else seed
    model, loaded, _ = load(ckpt, logs, tokenizer, device)
    if interactive:
        _session(model, loaded, max_new_tokens, sampling, seed)
        return
    if prompt is None:
        prompt = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
    _write(model, loaded, prompt, max_new_tokens, sampling, seed, num_samples, log_probabilities)


def _write(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    num_samples: int = 1,
    log_probabilities: bool = False,
) -> None:
    """Print one sample as it comes, several ones after another when all are there, and the speed to stderr."""
    prompt_ids, stop_id = encode_prompt(tokenizer, prompt)
    steps = sample_tokens(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        num_samples=num_samples,
        stop_id=stop_id,
    )
    began = time.perf_counter()
    samples: list[Sample] = []

    def first_ids() -> Iterator[int]:
        nonlocal samples
        for samples in steps:
            if not samples[0].finished:
                yield samples[0].token_ids[-1]

    if num_samples == 1 and not log_probabilities:
        print(prompt, end="", flush=True)
        for piece in tokenizer.decode_stream(first_ids()):
            print(piece, end="", flush=True)
        print()
    else:
        *_, samples = steps
        for i, sample in enumerate(samples):
            if num_samples > 1:
                print(f"{'' if i == 0 else chr(10)}--- sample {i + 1} (seed {seed + i})")
            if log_probabilities:
                for token_id, log_probability in zip(sample.token_ids, sample.log_probabilities, strict=True):
                    print(f"{token_id}\t{log_probability:.6f}\t{tokenizer.decode([token_id])!r}")
            else:
                print(prompt + tokenizer.decode(sample.token_ids))
    seconds = time.perf_counter() - began
    num_tokens = sum(len(sample.token_ids) + sample.finished for sample in samples)
    print(
        f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:,.0f} tokens/s), seed {seed}", file=sys.stderr
    )


def _session(model: TransformerLM, tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling, seed: int) -> None:
    """Read prompts from the terminal until Ctrl-D; Ctrl-C stops a text, `:name value` changes a setting."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing
    settings = ", ".join(f":{field.name}" for field in dataclasses.fields(Sampling))
    print(
        f"A prompt, then Enter. Settings: {settings}, :seed, :max_new_tokens and a value. Ctrl-D ends.", file=sys.stderr
    )
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if not line.startswith(":"):
            try:
                _write(model, tokenizer, line, max_new_tokens, sampling, seed)
            except KeyboardInterrupt:
                print(file=sys.stderr)
            seed += 1
            continue
        name, _, value = line[1:].partition(" ")
        try:
            if name == "seed":
                seed = int(value)
            elif name == "max_new_tokens":
                max_new_tokens = int(value)
            else:
                convert: Callable[[str], int | float] = int if name == "top_k" else float
                changed: dict[str, Any] = {name: convert(value)}
                sampling = dataclasses.replace(sampling, **changed)
        except (TypeError, ValueError) as error:
            print(error, file=sys.stderr)
