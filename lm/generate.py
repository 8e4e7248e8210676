"""Decoding: a prompt in, text out, one token at a time.

The model sees a window of at most `context_length` tokens. While the text fits, each new token costs one position: keys
and values of the others stand in the KV cache. When the window is full its start moves forward by a quarter of
`context_length` and the rest is encoded anew, so that every token is predicted from at least three quarters of the
context length, each at a position the model was trained at. (Dropping the oldest keys alone would be cheaper, but
text degrades when the first positions leave the cache: Xiao et al. 2023, "Efficient streaming language models with
attention sinks".) `window_start` is the whole rule, for prompts that are too long as well.
"""

import codecs
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm.device import pick_device
from lm.functional import softmax
from lm.model import KVCache, TransformerLM
from lm.stops import StopString, TextUntilStop, check_stop
from tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
LONGEST = 1_000_000  # tokens of a text: room for all of them is taken at once
FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn from the model's distributions, token by token.

    The logits are divided by `temperature` first; then the filters apply in the order of the fields, and what is left
    is normalised again.

    Args:
        temperature: 0 takes the most probable token (greedy), and so does what is below float32's smallest normal
            number, 1.2e-38; 1 is the model's own distribution.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of most probable tokens with at least this mass (Holtzman et al. 2020, nucleus
            sampling; CS336 A1 section 6).
        min_p: keep tokens at least this many times as probable as the most probable one (Nguyen et al. 2024).
        max_new_tokens: an upper bound of the text's length, at most a million.
        seed: the same one gives the same text.

    Raises:
        ValueError: a setting is out of its range.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= FLOAT32.max:
            raise ValueError(
                f"temperature={self.temperature} must be a number >= 0, within float32: 0 is greedy, 1 the model's own"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1: leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]: 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]: 0 keeps all tokens")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.max_new_tokens > LONGEST:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at most {LONGEST:,}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be in [0, 2^63)")

    def probabilities(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """The distribution, in float32, that the next token is drawn from."""
        logits = logits.float()
        if self.temperature < FLOAT32.tiny:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        # Minus the maximum first: a tiny temperature must not turn large logits into infinities.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / float(self.temperature)
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:
            return softmax(logits, dim=-1)
        # Stable: among equal logits the smaller token ids stay.
        logits, token_ids = logits.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            logits[..., self.top_k :] = -math.inf
        if self.top_p < 1:
            probabilities = softmax(logits, dim=-1)
            mass_before = probabilities.cumsum(dim=-1) - probabilities
            logits = logits.masked_fill(mass_before >= max(self.top_p, FLOAT32.tiny), -math.inf)  # the first one stays
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


def grow(
    model: TransformerLM,
    token_ids: Int[Tensor, "batch 1"],
    cache: KVCache,
    token_positions: Int[Tensor, "batch 1"] | None,
) -> Float[Tensor, "batch vocab"]:
    """Logits after one more token of each text."""
    # forward, not __call__: a model compiled for training would be compiled again for each length
    return model.forward(token_ids, cache, token_positions=token_positions)[:, -1]


@functools.cache
def compiled_grow() -> Callable[..., Tensor]:
    """`grow`, compiled: once for all texts of a model, as no shape depends on their lengths."""
    return torch.compile(grow)


class Decoder:
    """The logits after a batch of growing texts, with a KV cache.

    Args:
        model: decoded as it is.
        batch_size: the number of texts.
        padding: how many tokens at the beginning of each row are none of its text, where the lengths differ.
        compile: use torch.compile for the step from one token to the next, over the whole cache each time.
    """

    def __init__(
        self, model: TransformerLM, batch_size: int = 1, *, padding: Sequence[int] = (), compile: bool = False
    ) -> None:
        self._model = model
        self._compile = compile
        self._padding = list(padding) or [0] * batch_size
        self._cache = model.make_cache(batch_size)
        self._starts: list[int] = []  # row i of the cache holds the tokens [starts[i], end) of text i
        self._end = -1

    @torch.inference_mode()
    def next_logits(self, token_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
        """Logits of the token after `token_ids`, the whole text so far: that of the last call and one token more."""
        last = token_ids.shape[1] - 1
        context_length = self._model.config.context_length
        starts = [padding + window_start(last + 1 - padding, context_length) for padding in self._padding]
        held = self._starts if last == self._end else [-1] * len(starts)
        row = 0
        for (start, is_held), alike in groupby((start, start == old) for start, old in zip(starts, held, strict=True)):
            rows = slice(row, row := row + len(list(alike)))
            if not is_held and start < last:
                self._model.forward(token_ids[rows, start:last], self._cache.rows(rows))
        self._starts, self._end = starts, last + 1

        if not self._compile and min(starts) == max(starts):
            self._cache.length = last - starts[0]
            return grow(self._model, token_ids[:, last:], self._cache, None)
        positions = torch.tensor([[last - start] for start in starts], device=token_ids.device)
        self._cache.length = context_length if self._compile else last - min(starts) + 1
        step = compiled_grow() if self._compile else grow
        return step(self._model, token_ids[:, last:].contiguous(), self._cache, positions)


@dataclass
class Sample:
    """One continuation of the prompt, as far as it is written.

    Probabilities are the model's own, whatever the sampling made of them, as natural logarithms.

    Attributes:
        token_ids: the tokens, with the one that completes a stop string, without `<|endoftext|>`.
        log_probabilities: that of each.
        alternatives: for each, the most probable tokens at its place and their log-probabilities, best first.
        ended_by: why it is not continued, None while it is; who reads the steps may set it, and so end the sample.
        pieces: its text up to the stop string, in whole characters as they came; `sample_texts` alone fills it.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    ended_by: Literal["end of text", "stop string", "length"] | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The pieces as one."""
        return "".join(self.pieces)


def sample_batch(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = Sampling(),
    *,
    num_samples: int = 1,
    stop_id: int | None = None,
    forced_ids: Sequence[int] = (),
    barred_ids: Sequence[int] = (),
    num_alternatives: int = 0,
    compile: bool = False,
) -> Iterator[list[Sample]]:
    """Continue prompts; after each step, the samples as they stand (the same objects, grown by up to one token each).

    Sample i of a prompt draws from its own generator, seeded with `seed + i`: it does not depend on what else there is.

    Args:
        model: decoded as it is, on the device where it is.
        prompts: of any lengths, at least one token each; of a prompt longer than the context the model sees the end
            (`window_start`).
        sampling: default, the model's own distribution.
        num_samples: of each prompt; they follow each other. All are decoded together as one batch.
        stop_id: the token that ends a sample; default, none.
        forced_ids: the first tokens of each sample, taken as they are: what is reported of them scores a given text.
        barred_ids: tokens that are never drawn, such as `ids_without_token`.
        num_alternatives: how many of the most probable tokens are reported with each token.
        compile: use torch.compile, which takes up to a minute at first on a CPU.

    Raises:
        ValueError: there is no prompt or an empty one, ids are beyond the vocabulary, or a number is below 1; while it
            writes, the model's logits are not finite.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    check_prompts(prompts, forced_ids, model.config.vocab_size)
    device = model.token_embeddings.weight.device

    def steps() -> Iterator[list[Sample]]:
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        generators = [torch.Generator(device).manual_seed(sampling.seed + i % num_samples) for i in range(len(rows))]
        samples = [Sample() for _ in rows]
        longest, given = max(map(len, rows)), len(forced_ids)
        padding = [longest - len(prompt) for prompt in rows]
        decoder = Decoder(model, len(rows), padding=padding, compile=compile)
        length = longest + max(sampling.max_new_tokens, given)
        text = lay_out(rows, padding, forced_ids, length, device)
        barred = torch.tensor(barred_ids, dtype=torch.int64, device=device)
        for end in range(longest, length):
            logits = decoder.next_logits(text[:, :end]).float()
            if end >= longest + given:
                allowed = logits.index_fill(-1, barred, -math.inf) if len(barred) else logits
                text[:, end] = draw(sampling.probabilities(allowed), generators)
            extend(samples, text[:, end], logits, stop_id, num_alternatives)
            if end == length - 1:
                for sample in samples:
                    sample.ended_by = sample.ended_by or "length"
            yield samples
            if all(sample.ended_by for sample in samples):
                return

    return steps()


def check_prompts(prompts: Sequence[Sequence[int]], forced_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse what no model of this vocabulary can continue.

    Raises:
        ValueError: there is no prompt or an empty one, or an id is beyond the vocabulary.
    """
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    if not all(prompts):
        raise ValueError("a prompt is empty: start with the token of <|endoftext|>")
    for token_id in (*chain.from_iterable(prompts), *forced_ids):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id} is not in [0, vocab_size={vocab_size}): is it another tokenizer's?")


def lay_out(
    prompts: Sequence[Sequence[int]],
    padding: Sequence[int],
    forced_ids: Sequence[int],
    length: int,
    device: torch.device,
) -> Int[Tensor, "batch length"]:
    """Rows of `length` tokens, to be filled: the padding before each prompt, the prompt, the forced tokens, zeros."""
    padded = [[*[0] * before, *prompt, *forced_ids] for before, prompt in zip(padding, prompts, strict=True)]
    text = torch.zeros(len(padded), length, dtype=torch.int64, device=device)
    text[:, : len(padded[0])] = torch.tensor(padded, device=device)
    return text


def extend(
    samples: Sequence[Sample],
    drawn: Int[Tensor, " batch"],
    logits: Float[Tensor, "batch vocab"],
    stop_id: int | None,
    num_alternatives: int,
) -> None:
    """Add the drawn token, with what the logits say of it and of others, to each sample that has not ended.

    Raises:
        ValueError: the logits are not finite.
    """
    log_normalisers = logits.logsumexp(dim=-1, keepdim=True)
    log_probabilities = (logits.gather(-1, drawn[:, None]) - log_normalisers)[:, 0].tolist()
    if not all(map(math.isfinite, log_probabilities)):
        raise ValueError("the model's logits are not finite: its weights have diverged")
    best = logits.topk(min(num_alternatives, logits.shape[-1]))
    best_ids, best_log_probabilities = best.indices.tolist(), (best.values - log_normalisers).tolist()
    for i, (sample, token_id) in enumerate(zip(samples, drawn.tolist(), strict=True)):
        if sample.ended_by:
            continue
        if token_id == stop_id:
            sample.ended_by = "end of text"
        else:
            sample.token_ids.append(token_id)
            sample.log_probabilities.append(log_probabilities[i])
            sample.alternatives.append(list(zip(best_ids[i], best_log_probabilities[i], strict=True)))


def draw(probabilities: Float[Tensor, "batch vocab"], generators: Sequence[torch.Generator]) -> Int[Tensor, " batch"]:
    """One token of each row, drawn with the row's own generator; nothing waits for the device.

    Of clocks that ring at random, token a's with rate p(a), the first to ring is that of a with probability p(a):
    exponential times divided by their rates (what `torch.multinomial` does, after it has waited to check its input).
    """
    times = torch.empty_like(probabilities)
    for row, generator in zip(times, generators, strict=True):
        row.exponential_(generator=generator)
    return (probabilities / times).argmax(dim=-1)


def sample_tokens(
    model: TransformerLM, prompt_ids: Sequence[int], sampling: Sampling = Sampling(), **options: Any
) -> Iterator[list[Sample]]:
    """`sample_batch` of one prompt, with its options."""
    return sample_batch(model, [prompt_ids], sampling, **options)


# -------------------------------------------------------------------------------------------------------------- text


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id of `<|endoftext|>`, None where the tokenizer has none."""
    return tokenizer.special_ids.get(END_OF_TEXT)


def ids_without_token(model: TransformerLM, tokenizer: Tokenizer) -> list[int]:
    """The model's ids that mean nothing to the tokenizer: of a vocabulary that was padded, the rows beyond its end."""
    return [token_id for token_id in range(model.config.vocab_size) if token_id not in tokenizer.vocab]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of `prompt`; of an empty one that of `<|endoftext|>`: what stands before the first token of a document.

    Raises:
        ValueError: the prompt is empty and there is no `<|endoftext|>`.
    """
    if prompt:
        return tokenizer.encode(prompt)
    start = end_of_text_id(tokenizer)
    if start is None:
        raise ValueError(f"prompt is empty and the tokenizer has no {END_OF_TEXT} to start from: give a prompt")
    return [start]


def sample_texts(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    num_samples: int = 1,
    compile: bool = False,
    stop: Sequence[str] = (),
) -> Iterator[list[Sample]]:
    """`sample_batch` after texts, with tokens that the tokenizer has; the samples have their text.

    Each ends with its document, or before the first stop string that it completes.

    Raises:
        ValueError: as for `sample_batch`, `encode_prompt` and `check_stop`.
    """
    check_stop(stop)
    steps = sample_batch(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        sampling,
        num_samples=num_samples,
        stop_id=end_of_text_id(tokenizer),
        barred_ids=ids_without_token(model, tokenizer),
        compile=compile,
    )
    return add_text(tokenizer, steps, [StopString(string) for string in stop])


def add_text(
    tokenizer: Tokenizer, steps: Iterable[list[Sample]], stops: Sequence[StopString]
) -> Iterator[list[Sample]]:
    """The steps, with the text of each sample, which a stop string ends."""
    make_decoder = codecs.getincrementaldecoder("utf-8")
    going: list[tuple[Sample, codecs.IncrementalDecoder, TextUntilStop]] | None = None
    for samples in steps:
        if going is None:
            going = [(sample, make_decoder("replace"), TextUntilStop(stops)) for sample in samples]
        for sample, decoder, text in going:
            final = sample.ended_by is not None
            token = b"" if sample.ended_by == "end of text" else tokenizer.vocab[sample.token_ids[-1]]
            if piece := text.take(decoder.decode(token, final), final):
                sample.pieces.append(piece)
            if text.stopped:
                sample.ended_by = "stop string"
        going = [state for state in going if not state[0].ended_by]
        yield samples


def first_text(steps: Iterable[list[Sample]]) -> Iterator[str]:
    """The text of the first sample of `sample_texts`, in pieces of whole characters as they come."""
    num_shown = 0
    for samples in steps:
        yield from samples[0].pieces[num_shown:]
        num_shown = len(samples[0].pieces)


def stream(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str = "",
    sampling: Sampling = Sampling(),
    *,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The continuation of `prompt`, in pieces of whole characters as they come.

    Args:
        model: decoded as it is.
        tokenizer: the model's.
        prompt: default, a new document.
        sampling: default, the model's own distribution.
        stop: the first of these strings to be complete ends the text before it; what may be the beginning of one comes
            when it is known to be none.

    Raises:
        ValueError: the prompt cannot be encoded, see `encode_prompt`, or a stop string is empty.
    """
    return first_text(sample_texts(model, tokenizer, [prompt], sampling, stop=stop))


def generate(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str] = "",
    sampling: Sampling = Sampling(),
    *,
    num_samples: int = 1,
    compile: bool = False,
    stop: Sequence[str] = (),
) -> list[str]:
    """`num_samples` continuations of each prompt, decoded together; sample i of a prompt is that of `seed + i` alone.

    Each ends before the first of the strings in `stop` that it completes.

    Raises:
        ValueError: as for `stream`, or `num_samples` is below 1.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    *_, samples = sample_texts(model, tokenizer, prompts, sampling, num_samples, compile, stop)
    return [sample.text for sample in samples]


class Timed:
    """The steps of `sample_tokens`, passed on, with their speed."""

    def __init__(self, steps: Iterator[list[Sample]]) -> None:
        self.steps = steps
        self.samples: list[Sample] = []
        self.began = time.perf_counter()

    def __iter__(self) -> Iterator[list[Sample]]:
        for samples in self.steps:
            self.samples = samples
            yield samples

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.began
        num_tokens = sum(len(sample.token_ids) + (sample.ended_by == "end of text") for sample in self.samples)
        return f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:,.0f} tokens/s)"


# ------------------------------------------------------------------------------------------------- a trained model


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


def describe(model: TransformerLM, info: dict[str, Any]) -> str:
    """What `load` found, in one line: the run, its size, its best validation loss."""
    path, loss = Path(info["path"]), info["metrics"].get("val/loss")
    facts = [f"{sum(p.numel() for p in model.parameters()):,} parameters", f"step {info['step']:,}"]
    facts += [] if loss is None else [f"validation loss {loss:.3f} nats per token"]
    return f"{path.parent.parent}: {', '.join(facts)}"
