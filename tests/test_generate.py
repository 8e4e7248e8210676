"""lm.generate: the cache against full recomputation, the filters against their definitions, text, the command."""

import contextlib
import dataclasses
import io
import math
import os
import pty
import re
import select
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stops import before_stop

from lm import session as command
from lm.__main__ import main
from lm.checkpoint import AtomicCheckpointIO
from lm.generate import (
    Decoder,
    Sampling,
    draw,
    encode_prompt,
    end_of_text_id,
    generate,
    ids_without_token,
    sample_batch,
    sample_texts,
    sample_tokens,
    stream,
    window_start,
)
from lm.model import TransformerConfig, TransformerLM
from tokenizer import Tokenizer

BYTES = Tokenizer({0: b"<|endoftext|>"} | {i + 1: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(vocab_size=257, context_length=12, num_layers=2, num_heads=2, d_model=16, d_ff=64)


def make_model(seed: int = 0, **changes: object) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(dataclasses.replace(CONFIG, **changes)).eval()


# ------------------------------------------------------------------------------------------------------- the window


@given(st.integers(1, 200), st.integers(1, 40))
def test_window_ends_with_the_text_and_is_nearly_full(num_tokens: int, context_length: int) -> None:
    start = window_start(num_tokens, context_length)
    length = num_tokens - start
    if num_tokens <= context_length:
        assert start == 0
    else:
        assert context_length - max(1, context_length // 4) < length <= context_length
    assert window_start(num_tokens + 1, context_length) >= start


MODERN = {"qk_norm": True, "gated_attention": True, "value_embeddings": True}


@pytest.mark.parametrize("variant", [{}, {"position": "none"}, {"norm": "post", "head": "tied"}, MODERN], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 5, 12, 13, 40])
def test_cached_logits_equal_recomputation_beyond_the_context_too(prompt_length: int, variant: dict) -> None:
    model = make_model(**variant)
    decoder = Decoder(model, batch_size=2)
    text = torch.randint(1, 257, (2, prompt_length + 30))
    for end in range(prompt_length, text.shape[1] + 1):
        visible = text[:, window_start(end, CONFIG.context_length) : end]
        with torch.no_grad():
            expected = model(visible)[:, -1]
        torch.testing.assert_close(decoder.next_logits(text[:, :end]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, MODERN | {"attention": "fused"}], ids=["default", "modern"])
def test_prompts_of_different_lengths_each_continue_as_alone(variant: dict) -> None:
    """Some within the context, some beyond: their windows move on at different steps."""
    model = make_model(**variant)
    prompts = [[5], [10] * 10, list(range(11, 31))]
    sampling = Sampling(max_new_tokens=8, seed=3)
    *_, together = sample_batch(model, prompts, sampling, num_samples=2)
    alone = []
    for prompt in prompts:
        *_, samples = sample_tokens(model, prompt, sampling, num_samples=2)
        alone += samples
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)


def compare_compiled_with_eager(_: int) -> None:
    model = make_model()
    prompts = [[5], [6, 7, 8, 9], list(range(11, 31))]
    found = []
    for compile in (False, True):
        *_, samples = sample_batch(model, prompts, Sampling(max_new_tokens=30, seed=3), compile=compile)
        found.append(samples)
    for eager, compiled in zip(*found, strict=True):
        assert eager.token_ids == compiled.token_ids
        torch.testing.assert_close(*(torch.tensor(sample.log_probabilities) for sample in (eager, compiled)))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"{graphs} graphs: a shape depends on the length of the text"


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_texts() -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    # in a process of its own: the compiler cannot read through the type checks of the test run
    torch.multiprocessing.spawn(compare_compiled_with_eager)


# ----------------------------------------------------------------------------------------------------- the sampling

logits_lists = st.lists(st.integers(-80, 80).map(lambda i: i / 4), min_size=2, max_size=12)  # exact, with ties


@given(logits_lists, st.floats(0.05, 5))
def test_temperature_is_a_power_of_the_probabilities(logits: list[float], temperature: float) -> None:
    probabilities = Sampling(temperature=temperature).probabilities(torch.tensor(logits))
    expected = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, dim=-1)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-4, atol=1e-6)


@given(logits_lists, st.integers(1, 12))
def test_top_k_keeps_the_k_greatest(logits: list[float], k: int) -> None:
    kept = Sampling(top_k=k).probabilities(torch.tensor(logits)) > 0
    assert kept.sum() <= k
    threshold = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    assert all(logit >= threshold for logit, keep in zip(logits, kept.tolist(), strict=True) if keep)


@given(logits_lists, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_with_the_mass(logits: list[float], p: float) -> None:
    probabilities = torch.softmax(torch.tensor(logits), dim=-1)
    kept = Sampling(top_p=p).probabilities(torch.tensor(logits)) > 0
    mass = probabilities[kept].sum().item()
    assert mass >= p - 1e-5
    assert mass - probabilities[kept].min().item() < p + 1e-5
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


@given(logits_lists, st.floats(0.01, 1))
def test_min_p_is_relative_to_the_most_probable(logits: list[float], p: float) -> None:
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    ratio = probabilities / probabilities.max()
    kept = Sampling(min_p=p).probabilities(torch.tensor(logits)) > 0
    clear = (ratio - p).abs() > 1e-4
    assert torch.equal(kept[clear], (ratio >= p)[clear])


def test_greedy_takes_the_maximum_and_the_first_of_equals() -> None:
    probabilities = Sampling(temperature=0).probabilities(torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 1.0]]))
    assert probabilities.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-30}, {"temperature": 1e-50}, {"top_p": 1e-50}, {"temperature": 5e-324}], ids=str
)
def test_tiny_settings_are_greedy_not_nan(settings: dict) -> None:
    assert Sampling(**settings).probabilities(torch.tensor([1e4, 2e4])).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [10**30, 3e38])
def test_a_huge_temperature_makes_all_alike(temperature: float) -> None:
    assert Sampling(temperature=temperature).probabilities(torch.tensor([1.0, 2.0])).tolist() == [0.5, 0.5]


def test_samples_follow_the_distribution() -> None:
    """Frequencies of 4000 first tokens within five standard deviations, over the tokens that are not rare."""
    model = make_model(vocab_size=8)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[3]]))[0, -1], dim=-1)
    *_, samples = sample_tokens(model, [3], Sampling(max_new_tokens=1), num_samples=4000)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=8)
    deviation = (4000 * expected * (1 - expected)).sqrt()
    assert ((counts - 4000 * expected).abs() < 5 * deviation + 1).all()


def test_draws_are_those_of_torch_with_the_same_generators() -> None:
    probabilities = torch.randn(50, 997, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ours = draw(probabilities, [torch.Generator().manual_seed(i) for i in range(50)])
    theirs = [torch.multinomial(p, 1, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(probabilities)]
    assert ours.tolist() == torch.cat(theirs).tolist()


def test_a_model_that_has_diverged_says_so() -> None:
    model = make_model(vocab_size=8)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        next(sample_tokens(model, [3], Sampling(max_new_tokens=1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must be"),
        ({"temperature": math.nan}, r"temperature=nan must be"),
        ({"temperature": math.inf}, r"temperature=inf must be"),
        ({"temperature": 10**400}, r"temperature=10+ must be a number >= 0, within float32"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p=nan"),
        ({"top_k": 0}, r"top_k=0 must be at least 1"),
        ({"min_p": 1.5}, r"min_p=1\.5 must be in \[0, 1\]"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 10**12}, r"max_new_tokens=1000000000000 must be at most 1,000,000"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2\^63\)"),
    ],
)
def test_bad_settings_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        generate(make_model(), BYTES, "a", Sampling(**settings))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the tokens


def test_log_probabilities_are_the_models_own() -> None:
    model = make_model()
    *_, [sample] = sample_tokens(model, [5, 6], Sampling(temperature=0.5, top_k=3, max_new_tokens=6))
    text = torch.tensor([[5, 6, *sample.token_ids]])
    with torch.no_grad():
        expected = torch.log_softmax(model(text)[0], dim=-1)
    for i, token_id in enumerate(sample.token_ids):
        assert sample.log_probabilities[i] == pytest.approx(expected[1 + i, token_id].item(), abs=1e-4)


def test_alternatives_are_the_most_probable_tokens_at_each_place() -> None:
    model = make_model()
    *_, [sample] = sample_tokens(model, [5, 6], Sampling(max_new_tokens=4, seed=1), num_alternatives=3)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([[5, 6, *sample.token_ids]]))[0, 1:-1], dim=-1).topk(3)
    for i, alternatives in enumerate(sample.alternatives):
        assert [token_id for token_id, _ in alternatives] == expected.indices[i].tolist()
        assert [p for _, p in alternatives] == pytest.approx(expected.values[i].tolist(), abs=1e-4)


def test_forced_tokens_are_scored_and_then_the_text_goes_on_as_after_a_prompt() -> None:
    model = make_model()
    *_, [forced] = sample_tokens(model, [5], Sampling(max_new_tokens=6, temperature=0), forced_ids=[6, 7])
    *_, [prompted] = sample_tokens(model, [5, 6, 7], Sampling(max_new_tokens=4, temperature=0))
    assert forced.token_ids == [6, 7, *prompted.token_ids]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([[5, 6, 7]]))[0], dim=-1)
    assert forced.log_probabilities[:2] == pytest.approx([expected[0, 6].item(), expected[1, 7].item()], abs=1e-4)
    *_, [scored] = sample_tokens(model, [5], Sampling(max_new_tokens=1), forced_ids=[6, 7])
    assert scored.token_ids == [6, 7]


def test_same_seed_same_tokens_and_a_sample_does_not_depend_on_the_others() -> None:
    model = make_model()
    together = generate(model, BYTES, "x", Sampling(max_new_tokens=30, seed=7), num_samples=3)
    assert together == generate(model, BYTES, "x", Sampling(max_new_tokens=30, seed=7), num_samples=3)
    assert together == [generate(model, BYTES, "x", Sampling(max_new_tokens=30, seed=7 + i))[0] for i in range(3)]
    assert len(set(together)) == 3


def test_stops_at_the_end_of_text_of_each_sample() -> None:
    model = make_model()
    sampling = Sampling(max_new_tokens=80)
    *_, samples = sample_tokens(model, [1], sampling, num_samples=8, stop_id=0)
    assert any(sample.ended_by == "end of text" for sample in samples)
    *_, all_samples = sample_tokens(model, [1], sampling, num_samples=8)
    unstopped = [sample.token_ids for sample in all_samples]
    for i, sample in enumerate(samples):
        assert 0 not in sample.token_ids
        assert sample.ended_by == "end of text" or len(sample.token_ids) == 80
        assert sample.token_ids == unstopped[i][: len(sample.token_ids)]
        if sample.ended_by == "end of text":
            assert unstopped[i][len(sample.token_ids)] == 0


def test_prompt_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        sample_tokens(make_model(), [])
    with pytest.raises(ValueError, match="vocab_size=257"):
        sample_tokens(make_model(), [257])
    with pytest.raises(ValueError, match="token id -1"):
        sample_tokens(make_model(), [1], forced_ids=[-1])
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        sample_tokens(make_model(), [1], num_samples=0)
    with pytest.raises(ValueError, match="prompts is empty"):
        sample_batch(make_model(), [])


# --------------------------------------------------------------------------------------------------------- the text


def test_empty_prompt_starts_a_document() -> None:
    assert encode_prompt(BYTES, "") == [0] == [end_of_text_id(BYTES)]
    bare = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    assert encode_prompt(bare, "a") == [97]
    assert end_of_text_id(bare) is None
    with pytest.raises(ValueError, match="prompt is empty"):
        encode_prompt(bare, "")


def test_stream_joins_to_generate_and_never_splits_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    story = "né 猫 🙂!"
    answer = torch.tensor([*BYTES.encode(story), 0])

    def forced(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.full((token_ids.shape[0], 257), -50.0)
        logits[:, answer[token_ids.shape[1] - 1]] = 50.0
        return logits

    monkeypatch.setattr(Decoder, "next_logits", forced)
    pieces = list(stream(model, BYTES, "a"))
    assert "".join(pieces) == story == generate(model, BYTES, "a")[0]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "猫" in pieces


def test_ids_that_only_the_model_has_are_never_drawn() -> None:
    """A padded vocabulary, of an imported model for one: the rows beyond the tokenizer's, here the most probable."""
    model = make_model(vocab_size=300)
    assert ids_without_token(model, BYTES) == list(range(257, 300))
    with torch.no_grad():
        model.lm_head.weight[257:] = 100 * model.lm_head.weight[:43]
    prompts = ["a", "some more of it"]
    for sampling in (Sampling(temperature=0, max_new_tokens=20), Sampling(max_new_tokens=20, top_k=5)):
        assert all(generate(model, BYTES, prompts, sampling, num_samples=2))
        assert "".join(stream(model, BYTES, "a", sampling)) == generate(model, BYTES, "a", sampling)[0]


def test_inference_mode_does_not_leak_into_the_caller() -> None:
    for _ in sample_tokens(make_model(), [1], Sampling(max_new_tokens=2)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------------- the stop strings

# Some tokens have an end of line within them, some begin or end within a character.
MIXED = [b"ab", b"a\n", b"\n\n", b"a\xe7", b"\x8c\xab\nb", b"b\xe7\x8c"]
LIVELY = Tokenizer(BYTES.vocab | dict(enumerate(MIXED, 257)), [], ["<|endoftext|>"])
STOPS = [("\n\n",), ("b\n", "猫"), ("ab", "\nb", "a\n\n"), ("\ufffd",), ("never",)]


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch) -> TransformerLM:
    """A model that draws nothing but those, their letters and the end of the text."""
    drawn = {0, *LIVELY.encode("ab\n"), *range(257, 263)}
    monkeypatch.setattr("lm.generate.ids_without_token", lambda *_: sorted({*range(263)} - drawn))
    return make_model(vocab_size=263)


@pytest.mark.parametrize("stop", STOPS, ids=repr)
def test_each_sample_ends_before_its_first_stop_string(lively: TransformerLM, stop: tuple[str, ...]) -> None:
    """Of each prompt and seed the text without stop strings, cut; so a sample does not depend on the others either."""
    prompts, sampling, num_samples = ["a", "a longer one"], Sampling(max_new_tokens=25), 12
    whole = generate(lively, LIVELY, prompts, sampling, num_samples=num_samples)
    cut = [before_stop(text, stop) for text in whole]
    assert generate(lively, LIVELY, prompts, sampling, num_samples=num_samples, stop=stop) == cut
    for i in range(num_samples):
        pieces = list(stream(lively, LIVELY, "a", dataclasses.replace(sampling, seed=i), stop=stop))
        assert "".join(pieces) == cut[i]
        assert "" not in pieces
    assert (cut != whole) == (stop != ("never",))


@pytest.mark.parametrize("stop", STOPS, ids=repr)
def test_the_tokens_of_a_sample_end_with_the_one_that_completes_a_stop_string(
    lively: TransformerLM, stop: tuple[str, ...]
) -> None:
    sampling = Sampling(max_new_tokens=12)
    *_, whole = sample_texts(lively, LIVELY, ["a"], sampling, 30)
    *_, cut = sample_texts(lively, LIVELY, ["a"], sampling, 30, stop=stop)
    assert {sample.ended_by for sample in whole} == {"end of text", "length"}
    for one, other in zip(cut, whole, strict=True):
        length = len(one.token_ids)
        assert one.token_ids == other.token_ids[:length]
        assert one.log_probabilities == pytest.approx(other.log_probabilities[:length], abs=1e-4)
        stopped = any(string in other.text for string in stop)
        assert one.ended_by == ("stop string" if stopped else other.ended_by)
        if not stopped:
            assert one.token_ids == other.token_ids
        elif stop != ("\ufffd",):  # which is known to be one only after the token that follows
            assert any(string in LIVELY.decode(one.token_ids) for string in stop)
            assert not any(string in LIVELY.decode(one.token_ids[:-1]) for string in stop)


def test_a_batch_ends_with_its_last_sample(lively: TransformerLM) -> None:
    """Of samples that write a letter or an end of line each time, as soon as they have none of three bytes left."""
    sampling = Sampling(max_new_tokens=10_000)
    steps = [
        max(len(sample.token_ids) for sample in samples)
        for samples in sample_texts(lively, LIVELY, ["a", "b"], sampling, 3, stop=["a", "b", "\n"])
    ]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < 10


@pytest.mark.parametrize(("stop", "message"), [([""], "a stop string is empty"), ("END", "stop='END' must be a list")])
def test_bad_stop_strings_are_refused_at_once(stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(make_model(), BYTES, "a", stop=stop)
    with pytest.raises(ValueError, match=message):
        generate(make_model(), BYTES, "a", stop=stop)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of `make_model()` in a run directory with its tokenizer."""
    path = tmp_path / "run" / "checkpoints" / "step-000001.ckpt"
    weights = {f"model.{name}": weight for name, weight in make_model().state_dict().items()}
    contents = {"state_dict": weights, "transformer": dataclasses.asdict(CONFIG), "global_step": 1}
    AtomicCheckpointIO().save_checkpoint(contents, path)
    BYTES.save(tmp_path / "run" / "tokenizer")
    return path


def test_command_prints_prompt_and_continuation(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run("ab", ckpt=checkpoint, max_new_tokens=20, temperature=1.0, top_p=1.0, seed=3)
    out, err = capsys.readouterr()
    assert out == "ab" + generate(make_model(), BYTES, "ab", Sampling(max_new_tokens=20, seed=3))[0] + "\n"
    assert re.search(r"tokens/s\), seed 3$", err.strip())


def test_command_reads_a_pipe(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, but for the line feed that ends it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(" from a pipe \n\n"))
    command.run(ckpt=checkpoint.parents[1], max_new_tokens=3, temperature=0)
    assert capsys.readouterr().out == greedy(" from a pipe \n") + "\n"


def test_command_lists_samples_and_log_probabilities(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run("a", ckpt=checkpoint, max_new_tokens=4, seed=1, num_samples=2, log_probabilities=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "sample" in line] == ["--- sample 1 (seed 1)", "--- sample 2 (seed 2)"]
    tokens = [line.split("\t") for line in lines if "\t" in line]
    assert tokens
    assert all(float(log_probability) < 0 for _, log_probability, _ in tokens)


def test_command_continues_a_file_of_prompts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["ab", "", "a longer one"]
    (tmp_path / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    command.run(prompts=tmp_path / "prompts.txt", ckpt=checkpoint, **settings)
    out = capsys.readouterr().out
    for i, line in enumerate(lines):
        [text] = generate(make_model(), BYTES, line, Sampling(max_new_tokens=9, seed=3))
        assert f"--- prompt {i + 1}, sample 1 (seed 3)\n{line}{text}\n" in out
    with pytest.raises(ValueError, match="--prompts goes with no other prompt"):
        command.run("ab", tmp_path / "prompts.txt", checkpoint)
    (tmp_path / "prompts.txt").write_bytes("a\x0cb\u2028c\u0085d\r\n\r\ne".encode())
    command.run(prompts=tmp_path / "prompts.txt", ckpt=checkpoint, **settings)
    out = capsys.readouterr().out
    assert re.findall(r"--- prompt (\d)", out) == ["1", "2", "3"], "only an end of line ends a prompt"
    assert "--- prompt 1, sample 1 (seed 3)\na\x0cb\u2028c\u0085d" in out
    assert "--- prompt 3, sample 1 (seed 3)\ne" in out
    (tmp_path / "prompts.txt").write_text("")
    with pytest.raises(ValueError, match="is empty: write one prompt a line"):
        command.run(prompts=tmp_path / "prompts.txt", ckpt=checkpoint)
    (tmp_path / "prompts.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match="txt is not UTF-8 at byte 1: convert it, e"):
        command.run(prompts=tmp_path / "prompts.txt", ckpt=checkpoint)
    with pytest.raises(ValueError, match="the prompt is not UTF-8 at character 3: convert it, e"):
        command.run(prompt="caf\udce9", ckpt=checkpoint)


def test_command_ends_each_sample_before_a_stop_string(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = (Sampling(max_new_tokens=80, seed=seed) for seed in range(99))  # what comes depends on torch's version
    sampling = next(some for some in drawn if "\n" in generate(make_model(), BYTES, "ab", some)[0])
    settings: dict[str, Any] = {"max_new_tokens": 80, "temperature": 1.0, "top_p": 1.0, "seed": sampling.seed}
    [cut] = generate(make_model(), BYTES, "ab", sampling, stop=["\n"])
    command.run("ab", ckpt=checkpoint, stop=(r"\n",), **settings)
    assert capsys.readouterr().out == f"ab{cut}\n"
    (tmp_path / "prompts.txt").write_text("ab\nlonger\n")
    command.run(prompts=tmp_path / "prompts.txt", ckpt=checkpoint, stop=(r"\n", "e"), num_samples=2, **settings)
    out = capsys.readouterr().out
    for prompt in ("ab", "longer"):
        for text in generate(make_model(), BYTES, prompt, sampling, num_samples=2, stop=["\n", "e"]):
            assert f"\n{prompt}{text}\n" in out
    command.run("ab", ckpt=checkpoint, stop=(r"\n",), log_probabilities=True, **settings)
    ids = [int(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    assert BYTES.decode(ids) == f"{cut}\n"
    with pytest.raises(ValueError, match="a stop string is empty: leave it out"):
        command.run("ab", ckpt=checkpoint, stop=("",))


def test_stop_strings_are_what_was_typed_whatever_yaml_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["\n\n", "Q:", "- a", "[a", "{a: 1}", "null", "12", "# x", " ", '"', "'", r"\n", "猫🙂", "\x7f\u2028", "@x"]
    seen: list[tuple[str, ...] | None] = []

    def run(prompt: str | None = None, stop: tuple[str, ...] | None = None) -> None:
        seen.append(stop)

    monkeypatch.setattr(command, "run", run)
    assert main(["generate", "a", *(word for text in texts for word in ("--stop", text))]) == 0
    assert main(["generate", *(f"--stop={text}" for text in [*texts, "--a"]), "--prompt=a"]) == 0
    assert seen == [tuple(texts), (*texts, "--a")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop"], "argument --stop: expected one argument"),
        (["--stop", "--seed=3"], "argument --stop: expected one argument"),
        (["a", "--stop=", "x"], "'x' is one word too many: a value with blanks in it goes in quotes"),
        (["--stop", ""], "a stop string is empty: leave it out"),
        (["--stop=caf\udce9"], r"--stop 'caf\udce9' is not UTF-8: convert it, e.g. with iconv"),
    ],
    ids=str,
)
def test_what_is_no_stop_string_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with contextlib.suppress(SystemExit):
        main(["generate", *words])
    assert capsys.readouterr().err == f"error: {message}\n"


def session(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    command.run(ckpt=checkpoint, interactive=True, seed=0)


@pytest.mark.parametrize("option", [{"prompt": "ab"}, {"num_samples": 2}, {"log_probabilities": True}], ids=str)
def test_a_session_takes_no_option_that_it_would_leave_out(checkpoint: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--interactive goes with no .*--{next(iter(option))}"):
        command.run(ckpt=checkpoint, interactive=True, **option)


def greedy(prompt: str) -> str:
    return prompt + generate(make_model(), BYTES, prompt, Sampling(temperature=0, max_new_tokens=3))[0]


def test_session_answers_again_and_goes_on(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session(monkeypatch, checkpoint, "/temperature 0", "/max_new_tokens 3", "one", "", "two", "/again", "//three")
    out, err = capsys.readouterr()
    texts = [greedy("one"), greedy(greedy("one")), greedy("two"), greedy("two"), greedy("/three")]
    assert out == "".join(f"{text}\n" for text in texts)
    assert "validation" not in err.splitlines()[0]
    assert "parameters" in err.splitlines()[0]
    assert re.findall(r"tokens/s\), seed (\d+)", err) == ["0", "1", "2", "3", "4"]


def test_session_says_what_is_wrong_and_goes_on(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ["/top_p 7", "/top_p high", "/top_k 1.5", "/nonsense 1", "/seed -1", "/max_new_tokens 1000000000000"]
    all_again = ["/top_k 3", "/top_k none", "/settings", "/top_k 3", "/top_k all", "/settings"]
    session(monkeypatch, checkpoint, *wrong, "/help", *all_again, "/quit", "not reached")
    out, err = capsys.readouterr()
    assert out == ""
    for message in (
        "top_p=7.0 must be in (0, 1]",
        "/top_p needs a number, not 'high'",
        "/top_k needs a whole number, not '1.5'",
        "/nonsense is not known: /help says what is",
        "seed=-1 must be in",
        "max_new_tokens=1000000000000 must be at most 1,000,000",
        "/temperature 0.5  changes a setting",
        r"/stop TEXT        ends texts before TEXT, in which \n means a line feed, \t a tab and \\ a backslash;",
    ):
        assert message in err
    assert err.count("top_k=None top_p=0.95") == 2


def test_a_session_ends_texts_before_stop_strings_until_it_is_told_to_forget_them(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy("one")
    stop = [r"/stop  a\n", f"/stop {whole[4]}"]
    session(monkeypatch, checkpoint, "/temperature 0", "/max_new_tokens 3", *stop, "one", "/settings", "/stop", "one")
    out, err = capsys.readouterr()
    assert out == f"{whole[: whole.index(whole[4], 3)]}\n{whole}\n"
    stops = [" a\n", whole[4]]
    assert re.findall("^stop=(.*)$", err, re.MULTILINE) == [str(stops[:1]), str(stops), "[]"]
    assert f"seed=1 stop={stops}\n" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/settings\n"))
    command.run(ckpt=checkpoint, interactive=True, stop=("END", r"\n"))
    assert "stop=['END', '\\n']\n" in capsys.readouterr().err


def test_a_session_without_stdin_ends_at_once(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as after `<&-`
    command.run(ckpt=checkpoint, interactive=True, seed=0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("Ctrl-D ends\n\n")


@pytest.mark.parametrize("rank", ["", "1"])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_a_wrong_option_is_one_line_whatever_rank_the_environment_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, rank: str
) -> None:
    monkeypatch.setenv(name, rank)
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--temprature=1"])
    assert capsys.readouterr().err == "error: --temprature is no option: did you mean --temperature?\n"


def test_ctrl_c_stops_a_text_and_not_the_session(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    next_logits, calls = Decoder.next_logits, 0

    def interrupted(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return next_logits(self, token_ids)

    monkeypatch.setattr(Decoder, "next_logits", interrupted)
    session(monkeypatch, checkpoint, "/temperature 0", "/max_new_tokens 3", "one", "two")
    out, err = capsys.readouterr()
    assert re.search(r"stopped: 2 tokens in .* seed 0", err)
    assert out.endswith(f"\n{greedy('two')}\n")


@pytest.mark.slow
def test_session_in_a_real_terminal(checkpoint: Path, tmp_path: Path) -> None:
    """A pseudo-terminal, the keys as typed: Ctrl-C during a text, Ctrl-C and Ctrl-D at the prompt."""
    endless = Tokenizer(BYTES.vocab, [])  # to which <|endoftext|> is a token like others
    endless.save(checkpoint.parents[1] / "tokenizer")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        options = ["--interactive", "--ckpt", str(checkpoint), "--max_new_tokens", "100000", "--seed", "0"]
        os.execv(sys.executable, [sys.executable, "-m", "lm", "generate", *options])
    shown = b""

    def wait_for(*what: bytes) -> None:
        nonlocal shown
        for part in what:
            while part not in shown:
                assert select.select([terminal], [], [], 60)[0], shown
                shown += os.read(terminal, 4096)
            shown = shown.partition(part)[2]

    wait_for(b"> ")
    os.write(terminal, b"a\n")
    wait_for(b"a\r\na")
    os.write(terminal, b"\x03")
    wait_for(b"stopped: ", b"> ")
    while (
        True
    ):  # CPython overlooks a signal between its prompt and its wait for keys, as one does who then presses again
        os.write(terminal, b"\x03")
        if select.select([terminal], [], [], 5)[0]:
            break
    wait_for(b"Ctrl-D ends", b"> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_command_without_a_run_or_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m lm fit"):
        command.run("a", logs=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        command.run("a", ckpt=checkpoint.rename(tmp_path / "moved.ckpt"))
    with pytest.raises(ValueError, match="device=abacus"):
        command.run("a", ckpt=tmp_path / "moved.ckpt", device="abacus")
    larger = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abc"}, [(b"a", b"b"), (b"ab", b"c")])
    larger.save(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"vocab_size=258.*257.*another tokenizer"):
        command.run("a", ckpt=tmp_path / "moved.ckpt", tokenizer=tmp_path / "larger")


def test_of_equal_logits_the_smaller_ids_stay() -> None:
    kept = Sampling(top_k=3).probabilities(torch.zeros(1000)).nonzero().flatten()
    assert kept.tolist() == [0, 1, 2]


def test_a_model_with_a_padded_vocabulary_is_loaded_with_its_smaller_tokenizer(tmp_path: Path) -> None:
    model = make_model(vocab_size=264)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    contents = {"state_dict": weights, "transformer": dataclasses.asdict(model.config), "global_step": 1}
    AtomicCheckpointIO().save_checkpoint(contents, tmp_path / "run" / "checkpoints" / "step-000001.ckpt")
    BYTES.save(tmp_path / "run" / "tokenizer")
    command.run("a", ckpt=tmp_path / "run", max_new_tokens=3)
