"""lm.serve: the stream against `generate`, what is refused, who may ask, and the page in a real browser."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_browser
from toy import command

from lm import serve
from lm.checkpoint import AtomicCheckpointIO
from lm.generate import Decoder, Sampling, generate
from lm.model import TransformerConfig, TransformerLM
from lm.serve import MAX_BODY_BYTES, MAX_NEW_TOKENS, MAX_TEXTS, Handler, Server, is_own_name, read_request
from tokenizer import Tokenizer

BYTES = Tokenizer({0: b"<|endoftext|>"} | {i + 1: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(vocab_size=257, context_length=32, num_layers=1, num_heads=2, d_model=16, d_ff=32)
GREEDY = Sampling(temperature=0, max_new_tokens=20)
INFO = {"path": "logs/toy/version_3/checkpoints/step-000004.ckpt", "step": 4, "metrics": {"val/loss": 1.25}}


def make_model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(CONFIG).eval()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server("127.0.0.1", 0, make_model(), BYTES, INFO) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def ask(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, headers)
    return connection.getresponse()


def post(server: Server, **settings: Any) -> http.client.HTTPResponse:
    return ask(server, "POST", "/generate", json.dumps(settings).encode(), **{"Content-Type": "application/json"})


def written(server: Server, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pieces of a text and its summary."""
    answer = post(server, **settings)
    assert answer.status == 200
    *pieces, summary = [json.loads(line) for line in answer]
    return pieces, summary


def token_ids(pieces: list[dict[str, Any]]) -> list[int]:
    return [token["id"] for piece in pieces for token in piece["tokens"]]


Say = Callable[[list[int]], None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Makes every model write these ids after a prompt of one token."""

    def say(ids: list[int]) -> None:
        def forced(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
            logits = torch.full((token_ids.shape[0], 257), -50.0)
            logits[:, ids[(token_ids.shape[1] - 1) % len(ids)]] = 50.0
            return logits

        monkeypatch.setattr(Decoder, "next_logits", forced)

    return say


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_and_may_load_nothing_from_elsewhere(server: Server) -> None:
    answer = ask(server, "GET", "/")
    page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert len(re.findall(r"(script|style)-src 'sha256-[\w+/]{43}='", policy)) == 2
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_has_a_model_card(server: Server) -> None:
    facts = json.loads(ask(server, "GET", "/model").read())
    size = sum(p.numel() for p in make_model().parameters())
    assert facts["name"] == "toy/version_3"
    assert facts["card"] == f"{size:,} parameters, step 4, validation loss 1.250 nats per token, context 32 tokens"


@pytest.mark.parametrize("path", ["/", "/model", "/nothing"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    whole = ask(server, "GET", path)
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {whole.status} ".encode())
    assert f"Content-Length: {len(whole.read())}".encode() in head.split(b"\r\n")
    assert body == b""


def test_the_package_takes_its_page_along() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert serve.PAGE.name in project["tool"]["setuptools"]["package-data"]["lm"]


# -------------------------------------------------------------------------------------------------------- the text


def test_the_text_is_what_generate_writes(server: Server) -> None:
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_new_tokens": 60, "seed": 3}
    pieces, summary = written(server, prompt="ab", **settings)
    [expected] = generate(server.model, BYTES, "ab", Sampling(**settings))
    ids = token_ids(pieces)
    assert BYTES.decode(ids).removesuffix("<|endoftext|>") == expected
    assert (summary["num_tokens"], summary["seed"]) == (len(ids), 3)
    assert summary["seconds"] > 0


def test_probabilities_and_alternatives_are_the_models_own(server: Server) -> None:
    pieces, _ = written(server, prompt="ab", temperature=0.3, max_new_tokens=20, seed=1)
    ids = [*BYTES.encode("ab"), *token_ids(pieces)]
    with torch.no_grad():
        expected = torch.softmax(server.model(torch.tensor([ids]))[0], dim=-1)
    for i, token in enumerate(token for piece in pieces for token in piece["tokens"]):
        assert token["p"] == pytest.approx(expected[i + 1, token["id"]].item(), rel=1e-3)
        best = expected[i + 1].topk(len(token["alternatives"]))
        assert [token_id for token_id, _, _ in token["alternatives"]] == best.indices.tolist()
        assert [p for _, _, p in token["alternatives"]] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert len(pieces[0]["tokens"][0]["alternatives"]) == 8


def test_without_a_seed_each_text_has_one_of_its_own_and_says_which(server: Server) -> None:
    first, summary = written(server, prompt="ab", max_new_tokens=30)
    second, other = written(server, prompt="ab", max_new_tokens=30)
    assert summary["seed"] != other["seed"]
    assert token_ids(first) != token_ids(second)
    again, _ = written(server, prompt="ab", max_new_tokens=30, seed=summary["seed"])
    assert token_ids(again) == token_ids(first)


def test_a_character_of_several_tokens_is_one_piece(server: Server, say: Say) -> None:
    say([*BYTES.encode("né猫🙂!"), 0])
    pieces, summary = written(server, prompt="a")
    assert [piece["text"] for piece in pieces] == ["n", "é", "猫", "🙂", "!", ""]
    assert [len(piece["tokens"]) for piece in pieces] == [1, 2, 3, 4, 1, 1]
    assert [token["spelling"] for token in pieces[2]["tokens"]] == ["\\xe7", "\\x8c", "\\xab"]
    assert not any("escaped" in piece for piece in pieces)
    assert pieces[-1]["end"] == "end of text"
    assert pieces[-1]["tokens"][0]["spelling"] == "<|endoftext|>"
    assert summary["num_tokens"] == 12


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"a\x8cb", ["a", "\\x8c", "b"]),
        (b"\xe7\x8cb", ["\\xe7\\x8cb"]),
        (b"b\xe7", ["b", "\\xe7"]),
        (b"\xf0\x9f\xe7\x8c\xab", ["\\xf0\\x9f猫"]),
    ],
    ids=str,
)
def test_bytes_that_are_no_text_are_escaped_and_marked(server: Server, say: Say, data: bytes, texts: list[str]) -> None:
    say([byte + 1 for byte in data])
    pieces, _ = written(server, prompt="a", max_new_tokens=len(data))
    assert [piece["text"] for piece in pieces] == texts
    assert [piece.get("escaped", False) for piece in pieces] == ["\\" in text for text in texts]
    assert token_ids(pieces) == [byte + 1 for byte in data]
    say([*(byte + 1 for byte in data), 0])
    assert [piece["text"] for piece in written(server, prompt="a")[0]] == [*texts, ""]


def test_a_text_goes_on_where_it_was_and_takes_what_was_chosen(server: Server) -> None:
    whole, _ = written(server, prompt="ab", temperature=0, max_new_tokens=12)
    ids = token_ids(whole)
    rest, _ = written(server, prompt="ab", token_ids=ids[:5], temperature=0, max_new_tokens=7)
    assert token_ids(rest) == ids[5:]
    chosen, _ = written(server, prompt="ab", token_ids=ids[:5], forced_ids=ids[5:7], temperature=0, max_new_tokens=7)
    assert token_ids(chosen) == ids[5:]
    other, _ = written(server, prompt="ab", token_ids=ids[:5], forced_ids=[66], max_new_tokens=3)
    assert token_ids(other)[0] == 66


@pytest.mark.parametrize("seed", range(6))
def test_the_text_ends_before_a_stop_string_as_that_of_generate(server: Server, seed: int) -> None:
    settings = {"max_new_tokens": 60, "seed": seed, "temperature": 2.0, "top_p": 1.0}
    [whole] = generate(server.model, BYTES, "ab", Sampling(**settings))
    for stop in ([whole[20:23]], [whole[30:32], whole[31:35], "never"], ["\ufffd"], ["never"]):
        [cut] = generate(server.model, BYTES, "ab", Sampling(**settings), stop=stop)
        pieces, summary = written(server, prompt="ab", stop=stop, **settings)
        assert summary["num_tokens"] == len(token_ids(pieces))
        assert (pieces[-1].get("end") == "stop string") == any(string in whole for string in stop)
        end = pieces.pop()["text"] if "end" in pieces[-1] else ""
        assert BYTES.decode(token_ids(pieces)) + end == cut


def test_what_may_be_a_stop_string_waits_and_is_one_piece_in_the_end(server: Server, say: Say) -> None:
    say([*BYTES.encode("a\nno\n\nQ!"), 0])
    pieces, _ = written(server, prompt="a", stop=["\n\nQ"])
    assert [piece["text"] for piece in pieces] == ["a", "\n", "n", "o", ""]
    assert pieces[-1]["end"] == "stop string"
    assert [token["spelling"] for token in pieces[-1]["tokens"]] == ["\n", "\n", "Q"]
    pieces, _ = written(server, prompt="a", stop=["!!", "endoftext"])
    assert [piece["text"] for piece in pieces] == [*"a\nno\n\nQ!", ""]
    assert pieces[-1]["end"] == "end of text"


def test_a_stop_string_may_begin_and_end_within_a_token() -> None:
    tokens = [b"yes. ", b"No", b"\n\n", b"Q: what"]
    tokenizer = Tokenizer(BYTES.vocab | dict(enumerate(tokens, 257)), [])
    events = [{"text": token.decode(), "tokens": [{"id": i}]} for i, token in enumerate(tokens, 257)]
    end = {"text": "N", "end": "stop string", "tokens": [{"id": 258}, {"id": 259}, {"id": 260}]}
    assert list(serve.until_stop(tokenizer, events, ["o\n\nQ"])) == [events[0], end]
    assert list(serve.until_stop(tokenizer, events, ["Q: what?", "none"])) == events


def test_ids_that_the_tokenizer_lacks_are_named_and_not_drawn(server: Server) -> None:
    assert [serve.spell(BYTES, token_id) for token_id in (66, 300)] == ["A", "<id 300>"]
    torch.manual_seed(0)
    server.model = TransformerLM(dataclasses.replace(CONFIG, vocab_size=300)).eval()
    with torch.no_grad():
        server.model.lm_head.weight[257:] = 100 * server.model.lm_head.weight[:43]
    pieces, _ = written(server, prompt="ab", max_new_tokens=20, temperature=0)
    assert max(token_ids(pieces)) < 257
    assert BYTES.decode(token_ids(pieces)).startswith(generate(server.model, BYTES, "ab", GREEDY)[0])
    forced, _ = written(server, prompt="ab", forced_ids=[299], max_new_tokens=1)
    assert forced[0]["tokens"][0]["spelling"] == "<id 299>", "who asks for one by name gets it"


def test_each_piece_comes_when_it_is_written(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    next_logits, allowed = Decoder.next_logits, threading.Semaphore(1)

    def held_back(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
        assert allowed.acquire(timeout=60)
        return next_logits(self, token_ids)

    monkeypatch.setattr(Decoder, "next_logits", held_back)
    answer = post(server, prompt="a", forced_ids=[66, 67, 68], max_new_tokens=3)
    for text in "ABC":
        assert json.loads(answer.readline())["text"] == text  # the next step is not allowed yet
        allowed.release()
    assert json.loads(answer.readline())["num_tokens"] == 3


@pytest.mark.slow
def test_texts_at_the_same_time_are_those_of_texts_alone(server: Server) -> None:
    alone = [token_ids(written(server, prompt="ab", max_new_tokens=40, seed=seed)[0]) for seed in range(4)]
    together: dict[int, list[int]] = {}

    def write(seed: int) -> None:
        together[seed] = token_ids(written(server, prompt="ab", max_new_tokens=40, seed=seed)[0])

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(4)] == alone


def test_no_more_texts_than_places(server: Server) -> None:
    for _ in range(MAX_TEXTS):
        server.places.acquire()
    answer = post(server, prompt="a")
    assert (answer.status, json.loads(answer.read())) == (
        503,
        {"error": "8 texts are being written: try again when one is done"},
    )
    server.places.release(MAX_TEXTS)
    assert written(server, prompt="a", max_new_tokens=1)


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes a step take some milliseconds; the list grows with each."""
    next_logits, steps = Decoder.next_logits, []

    def slow(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
        steps.append(token_ids.shape[1])
        time.sleep(0.01)
        return next_logits(self, token_ids)

    monkeypatch.setattr(Decoder, "next_logits", slow)
    return steps


def test_writing_ends_when_the_browser_goes(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = slow_steps(monkeypatch)
    body = b'{"prompt": "a", "max_new_tokens": 4096, "top_k": 100}'
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(b"POST /generate HTTP/1.1\r\n" + head + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    for _ in range(MAX_TEXTS):  # the last one comes back when the writing has ended
        assert server.places.acquire(timeout=60)
    server.places.release(MAX_TEXTS)
    assert len(steps) < 4096
    assert capfd.readouterr().err == "", "a browser that goes is nothing to complain about"


def test_a_server_that_stops_ends_its_texts(server: Server, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    say([66])
    steps = slow_steps(monkeypatch)
    answer = post(server, prompt="a", max_new_tokens=4096)
    answer.readline()
    server.stop()
    assert len(steps) < 4096
    assert json.loads(answer.read().splitlines()[-1])["num_tokens"] == len(steps)
    server.places.release(MAX_TEXTS)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is no JSON: Expecting property name"),
        (b"\xff", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", "the body is no JSON object"),
        (b"{}\n{}", "the body is no JSON: Extra data"),
        (b'{"prompt": 3}', "prompt must be a string"),
        (b'{"temperature": "hot"}', "temperature='hot' is not of the right type"),
        (b'{"temperature": true}', "temperature=True is not of the right type"),
        (b'{"temperature": NaN}', "temperature=nan must be a number >= 0"),
        (b'{"temperature": -1}', "temperature=-1 must be"),
        (b'{"temperature": 1%b}' % (b"0" * 400), "must be a number >= 0"),
        (b'{"max_new_tokens": 1%b}' % (b"0" * 400), "must be at most 4096 here"),
        (b'{"top_p": 0}', "top_p=0 must be in (0, 1]"),
        (b'{"top_k": 1.5}', "top_k=1.5 is not of the right type"),
        (b'{"seed": -1}', "seed=-1 must be in"),
        (b'{"seed": 99999999999999999999}', "seed=99999999999999999999 must be in"),
        (b'{"max_new_tokens": 4097}', "max_new_tokens=4097 must be at most 4096 here"),
        (b'{"max_new_tokens": 0}', "max_new_tokens=0 must be at least 1"),
        (b'{"warmth": 1}', "warmth is no setting: there are prompt, token_ids, forced_ids, stop, temperature"),
        (b'{"token_ids": 1}', "token_ids and forced_ids must be lists of whole numbers"),
        (b'{"forced_ids": [1.0]}', "token_ids and forced_ids must be lists of whole numbers"),
        (b'{"stop": "END"}', "stop must be a list of strings"),
        (b'{"stop": [1]}', "stop must be a list of strings"),
        (b'{"stop": ["END", ""]}', "a stop string is empty: leave it out"),
        (b'{"stop": ["\\ud800"]}', "is not all UTF-8"),
        (b'{"token_ids": [257]}', "token id 257 is not in [0, vocab_size=257)"),
        (b'{"forced_ids": [-1]}', "token id -1 is not in"),
    ],
    ids=lambda value: value[:40].decode("utf-8", "replace") if isinstance(value, bytes) else "",
)
def test_a_bad_request_is_answered_in_one_line(server: Server, body: bytes, message: str) -> None:
    answer = ask(server, "POST", "/generate", body, **{"Content-Type": "application/json"})
    said = answer.read()
    assert answer.status == 400
    assert said.count(b"\n") == 1
    assert message in json.loads(said)["error"]
    assert "\n" not in json.loads(said)["error"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/../serve.py", {}, 404),
        ("POST", "/nothing", {"Content-Type": "application/json"}, 404),
        ("POST", "/generate", {"Content-Type": "text/plain"}, 415),
        ("POST", "/generate", {"Content-Type": "application/json", "Content-Length": "x"}, 411),
        ("POST", "/generate", {"Content-Type": "application/json", "Content-Length": str(MAX_BODY_BYTES + 1)}, 413),
        ("POST", "/generate", {"Content-Type": "application/json", "Content-Length": "9" * 5000}, 413),
        ("DELETE", "/", {}, 501),
        ("GET", "/", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Host": "localhost.evil.example:80"}, 403),
        ("GET", "/", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", "/", {"Host": "[::1"}, 403),
        ("GET", "/", {"Host": ""}, 403),
        ("GET", "/", {"Host": "localhost:1234"}, 200),
        ("GET", "/", {"Host": "[::1]:1234"}, 200),
        ("GET", "/model", {"Origin": "http://evil.example"}, 403),
        ("GET", "/model", {"Host": "localhost:5", "Origin": "http://localhost:6"}, 403),
        ("GET", "/model", {"Host": "localhost:5", "Origin": "null"}, 403),
        ("GET", "/model", {"Host": "localhost:5", "Origin": "http://localhost:5"}, 200),
        ("POST", "/generate", {"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ("POST", "/generate", {"Content-Type": "application/json", "Host": "evil.example"}, 403),
    ],
    ids=lambda value: ", ".join(f"{k}={v[:30]}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_who_may_ask_for_what(server: Server, method: str, path: str, headers: dict[str, str], status: int) -> None:
    answer = ask(server, method, path, b"{}" if method == "POST" else None, **headers)
    assert answer.status == status
    if status != 200:
        assert list(json.loads(answer.read())) == ["error"]


def test_a_body_that_breaks_off_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(f"POST /generate HTTP/1.1\r\n{head}{{}}".encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"the body breaks off after 2 of 100 bytes" in answer


def test_the_body_has_a_limit_and_the_number_of_tokens_another() -> None:
    assert 10_000 < MAX_BODY_BYTES <= 1 << 20
    assert 256 < MAX_NEW_TOKENS <= 10_000


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "toy" / "version_0" / "checkpoints" / "step-000001.ckpt"
    weights = {f"model.{name}": weight for name, weight in make_model().state_dict().items()}
    contents = {"state_dict": weights, "transformer": dataclasses.asdict(CONFIG), "global_step": 1}
    AtomicCheckpointIO().save_checkpoint(contents, path)
    BYTES.save(path.parent.parent / "tokenizer")
    return path


def test_command_without_a_run_or_a_port(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m lm fit"):
        serve.run(logs=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"port=65536 must be in \[0, 65535\]"):
        serve.run(checkpoint, port=65536)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} is in use: choose another"):
            serve.run(checkpoint, port=port)
    with pytest.raises(ValueError, match=r"host=192\.0\.2\.1, port=0: "):
        serve.run(checkpoint, "192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "address", "warns"),
    [("127.0.0.1", "http://127.0.0.1:", False), ("localhost", "http://localhost:", False), ("0.0.0.0", "", True)],
)
def test_command_warns_when_others_can_reach_it(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    address: str,
    warns: bool,
) -> None:
    monkeypatch.setattr(Server, "serve_forever", lambda self, poll_interval: None)
    serve.run(checkpoint, host, 0)
    out, err = capsys.readouterr()
    assert address in out
    assert ("warning: everyone who can reach" in err) == warns


@pytest.mark.slow
def test_command_serves_until_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("serve", f"--logs={tmp_path}", "--port=0", "--device=cpu"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        assert "parameters" in process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/   Ctrl-C ends", process.stdout.readline())
        assert found
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/model")
        assert json.loads(connection.getresponse().read())["name"] == "toy/version_0"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "\nstopped\n"
    assert process.returncode == 130


# ----------------------------------------------------------------------------------------------------- the browser

SPANS = "[...document.querySelectorAll('#text .token')]"


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[Browser]:
    """The page, in a browser, with the errors that it met checked at the end."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    with Browser(program, tmp_path / "profile") as page:
        page.open(server.address)
        page.wait_for("document.title == 'toy/version_3'")
        yield page
        assert page.errors == []


@pytest.mark.slow
def test_browser_shows_a_text_and_what_else_it_could_have_been(page: Browser, server: Server, say: Say) -> None:
    say([*BYTES.encode("né猫\n!"), 0])
    page.evaluate("document.querySelector('#prompt').value = 'a'; document.querySelector('#write').click()")
    page.wait_for("document.querySelector('#status').textContent.includes('tokens/s')")
    assert page.evaluate("document.querySelector('#text').textContent") == "ané猫\n!end of text"
    assert page.evaluate(f"{SPANS}.map((span) => span.textContent)") == ["n", "é", "猫", "\n", "!", "end of text"]
    page.move_to("#text .token:nth-of-type(4)")  # the prompt is the first
    page.wait_for("!document.querySelector('#choices').hidden")
    shown = page.evaluate("document.querySelector('#choices').innerText")
    assert re.search(r"Part 2 of 3: \\x8c 100 %", shown)
    assert page.evaluate("document.querySelectorAll('#choices li').length") == 3 * 8
    page.press("Escape")
    assert page.evaluate("document.querySelector('#choices').hidden")


@pytest.mark.slow
def test_browser_ends_a_text_before_a_stop_string(page: Browser, say: Say) -> None:
    def write(stop: str) -> str:
        page.evaluate(f"document.querySelector('#ends').value = {json.dumps(stop)}")
        page.evaluate("document.querySelector('#write').click()")
        page.wait_for("document.querySelector('#status').textContent.includes('tokens/s')")
        return page.evaluate("document.querySelector('#text').textContent")

    say([*BYTES.encode("a\\b\nno\n\nQ!"), 0])
    page.evaluate("document.querySelector('#prompt').value = '>'")
    assert write("a\\\\b!\n\n\\n\\nQ\n") == ">a\\b\nnostop string"
    assert page.evaluate("document.querySelector('#more').disabled")
    page.move_to("#text .end")
    page.wait_for("!document.querySelector('#choices').hidden")
    assert "Part 3 of 3: Q 100 %" in page.evaluate("document.querySelector('#choices').innerText")
    assert write("a\\\\b") == ">stop string"


@pytest.mark.slow
def test_browser_by_keyboard_and_another_choice(page: Browser, server: Server) -> None:
    page.evaluate("for (const [id, value] of [['prompt', 'ab'], ['max_new_tokens', 12], ['temperature', 0]])"
                  " { document.getElementById(id).value = value; }")  # fmt: skip
    page.evaluate("document.querySelector('#prompt').focus()")
    page.evaluate("document.querySelector('#write').click()")
    page.wait_for("document.querySelector('#status').textContent.includes('12 tokens')")
    before = page.evaluate(f"{SPANS}.flatMap((span) => span.piece.tokens.map((token) => token.id))")
    pieces, _ = written(server, prompt="ab", max_new_tokens=12, temperature=0)
    assert before == token_ids(pieces)
    page.evaluate(f"{SPANS}[0].focus()")
    page.press("ArrowRight")
    assert page.evaluate(f"document.activeElement == {SPANS}[1]")
    page.press("Enter")
    page.press("ArrowDown")
    chosen = page.evaluate(f"{SPANS}[1].piece.tokens[0].alternatives[1][0]")
    page.evaluate("document.querySelector('#status').textContent = ''")
    page.evaluate("document.activeElement.click()")
    page.wait_for("document.querySelector('#status').textContent.includes('12 tokens')")
    after = page.evaluate(f"{SPANS}.flatMap((span) => span.piece.tokens.map((token) => token.id))")
    kept = len(pieces[0]["tokens"])
    assert after[: kept + 1] == [*before[:kept], chosen]
    assert after != before


@pytest.mark.slow
def test_browser_stops_and_says_when_something_is_wrong(
    page: Browser, server: Server, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    say([66])
    steps = slow_steps(monkeypatch)
    page.evaluate("document.querySelector('#max_new_tokens').value = 4000; document.querySelector('#write').click()")
    page.wait_for(f"{SPANS}.length > 3")
    page.press("Escape")
    page.wait_for("document.querySelector('#status').textContent == 'stopped'")
    for _ in range(MAX_TEXTS):
        assert server.places.acquire(timeout=60)
    server.places.release(MAX_TEXTS)
    assert len(steps) < 4000
    page.evaluate("document.querySelector('#max_new_tokens').value = 5000; document.querySelector('#write').click()")
    page.wait_for("document.querySelector('#status.wrong')?.textContent.includes('must be at most 4096')")
    page.errors.clear()  # the browser notes the answer 400
    page.dark(True)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"


@pytest.mark.slow
def test_browser_shows_no_markup_of_the_models(page: Browser, say: Say) -> None:
    say([*BYTES.encode("<b onclick=x>&amp;"), 0])
    page.evaluate("document.querySelector('#prompt').value = '<'; document.querySelector('#write').click()")
    page.wait_for("document.querySelector('#status').textContent.includes('tokens/s')")
    assert page.evaluate("document.querySelector('#text').textContent") == "<<b onclick=x>&amp;end of text"
    assert page.evaluate("document.querySelector('#text b') == null")


def test_a_server_that_stops_has_seen_its_texts_end(server: Server, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    say([66])
    slow_steps(monkeypatch)
    answer = post(server, prompt="a", max_new_tokens=4096)
    answer.readline()
    server.stop()
    assert not server.places.acquire(blocking=False), "a text had its place still"
    server.places.release(MAX_TEXTS)
    answer.read()


def test_a_connection_that_says_nothing_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "timeout", Handler.timeout / 100)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        assert connection.recv(1) == b""


def test_no_other_page_may_frame_this_one(server: Server) -> None:
    assert "frame-ancestors 'none'" in ask(server, "GET", "/").headers["Content-Security-Policy"].split("; ")


def test_a_host_name_is_known_in_any_case() -> None:
    assert is_own_name("mybox.lan:8000", "MyBox.lan")


def test_a_server_asked_to_compile_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Decoder.__init__

    def init(self: Decoder, *args: Any, compile: bool = False, **rest: Any) -> None:
        seen.append(compile)
        original(self, *args, **rest)

    monkeypatch.setattr(Decoder, "__init__", init)
    with Server("127.0.0.1", 0, make_model(), BYTES, INFO, compile=True) as server:
        list(server.write(read_request(b'{"prompt": "a", "max_new_tokens": 1}')))
    assert seen == [True]
