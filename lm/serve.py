"""`python -m lm serve`: a page where a model writes, each token shaded by its probability.

Python's own HTTP server and one file of HTML, `serve.html`; nothing comes from elsewhere.

    GET  /          the page
    GET  /model     what it says of the model, as JSON
    POST /generate  settings as JSON; the answer is one JSON object a line: pieces of text as they come, then a summary

HEAD is answered as GET is, without the body.

It listens on the loopback interface unless told otherwise. A request under a foreign name is refused even there, for a
web page could give its own name the address 127.0.0.1 (DNS rebinding), and so is one that another page has sent.
"""

import base64
import codecs
import errno
import hashlib
import ipaddress
import json
import math
import random
import re
import socket
import socketserver
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lm.generate import (
    Sample,
    Sampling,
    describe,
    encode_prompt,
    end_of_text_id,
    ids_without_token,
    load,
    sample_tokens,
)
from lm.model import TransformerLM
from lm.stops import StopString, TextUntilStop, check_stop
from tokenizer import Tokenizer

PAGE = Path(__file__).with_name("serve.html")
NOT_SAMPLING: dict[str, Any] = {"prompt": "", "token_ids": (), "forced_ids": (), "stop": ()}
NUM_ALTERNATIVES = 8
MAX_BODY_BYTES = 1 << 18
MAX_NEW_TOKENS = 4096
MAX_TEXTS = 8  # written at the same time


# --------------------------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class Request:
    """What a browser asks for: a text that goes on after `prompt`, `token_ids` and `forced_ids`.

    Attributes:
        prompt: encoded first.
        token_ids: follow the prompt; the browser has them already.
        forced_ids: follow them; taken instead of drawn, and sent like the rest.
        stop: strings before which the text ends, if it has one after `token_ids`.
        sampling: for the rest.
    """

    prompt: str
    token_ids: Sequence[int]
    forced_ids: Sequence[int]
    stop: Sequence[str]
    sampling: Sampling


def read_request(body: bytes) -> Request:
    """The request in a JSON body.

    Raises:
        ValueError: it is none, in one line.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}") from None
    if not isinstance(asked, dict):
        raise ValueError("the body is no JSON object")
    prompt, token_ids, forced_ids, stop = (asked.pop(name, default) for name, default in NOT_SAMPLING.items())
    if not isinstance(prompt, str):
        raise ValueError("prompt must be a string")
    if not all(isinstance(ids, list | tuple) and all(type(i) is int for i in ids) for ids in (token_ids, forced_ids)):
        raise ValueError("token_ids and forced_ids must be lists of whole numbers")
    if not (isinstance(stop, list | tuple) and all(isinstance(string, str) for string in stop)):
        raise ValueError("stop must be a list of strings")
    check_stop(stop)
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Sampling)}
    for name, value in asked.items():
        if name not in kinds:
            raise ValueError(f"{name} is no setting: there are {', '.join([*NOT_SAMPLING, *kinds])}")
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise ValueError(f"{name}={value!r} is not of the right type")
    settings: dict[str, Any] = {"seed": random.randrange(2**31), "temperature": 0.8, "top_p": 0.95}
    if asked.get("max_new_tokens", 0) > MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens={asked['max_new_tokens']} must be at most {MAX_NEW_TOKENS} here")
    return Request(prompt, token_ids, forced_ids, stop, Sampling(**settings | asked))


def pieces(tokenizer: Tokenizer, steps: Iterator[list[Sample]], stop_id: int | None) -> Iterator[dict[str, Any]]:
    r"""The first sample as it comes, in pieces of whole characters with the tokens that they are made of.

    A character of several tokens comes when it is complete, all its tokens at once. Bytes that are no UTF-8 are written
    as escapes, `\xe7`, and their piece is marked. The token of `<|endoftext|>` is a piece without text, the last one,
    which says so.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    token_ids: list[int] = []
    tokens: list[dict[str, Any]] = []

    def piece(text: str) -> dict[str, Any]:
        whole = b"".join(tokenizer.vocab.get(token_id, b"") for token_id in token_ids)
        made: dict[str, Any] = {"text": text, "tokens": [*tokens]}
        if text.encode() != whole:
            made["escaped"] = True
        token_ids.clear()
        tokens.clear()
        return made

    text = ""
    for [sample] in steps:
        token_id = sample.token_ids[-1]
        if token_id == stop_id:
            if tokens:
                yield piece(text + decoder.decode(b"", final=True))
            yield {"text": "", "end": "end of text", "tokens": [told(tokenizer, sample)]}
            return
        token_ids.append(token_id)
        tokens.append(told(tokenizer, sample))
        text += decoder.decode(tokenizer.vocab.get(token_id, b""))
        if not decoder.getstate()[0]:
            yield piece(text)
            text = ""
    if tokens:
        yield piece(text + decoder.decode(b"", final=True))


def until_stop(tokenizer: Tokenizer, events: Iterable[dict[str, Any]], stop: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The pieces of a text up to a stop string; those that may have a part of one come when it is known.

    The last one has the tokens of the stop string, and of its text what stands before that.
    """
    text, certain = TextUntilStop([StopString(string) for string in stop]), ""
    waiting: deque[tuple[int, dict[str, Any]]] = deque()
    for event in events:
        tokens = [] if "end" in event else event["tokens"]
        piece = b"".join(tokenizer.vocab.get(token["id"], b"") for token in tokens).decode(errors="replace")
        waiting.append((len(piece), event))
        certain += text.take(piece)
        while waiting and waiting[0][0] <= len(certain):
            length, first = waiting.popleft()
            certain = certain[length:]
            yield first
        if text.stopped:
            tokens = [token for _, late in waiting for token in late["tokens"]]
            yield {"text": certain, "end": "stop string", "tokens": tokens}
            return
    yield from (event for _, event in waiting)


def told(tokenizer: Tokenizer, sample: Sample) -> dict[str, Any]:
    """What the page gets to know of a sample's last token."""
    alternatives = [[token_id, spell(tokenizer, token_id), share(p)] for token_id, p in sample.alternatives[-1]]
    token_id, p = sample.token_ids[-1], share(sample.log_probabilities[-1])
    return {"id": token_id, "spelling": spell(tokenizer, token_id), "p": p, "alternatives": alternatives}


def spell(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself, readable: bytes that are only part of a character as escapes."""
    token = tokenizer.vocab.get(token_id)
    return f"<id {token_id}>" if token is None else token.decode("utf-8", "backslashreplace")


def share(log_probability: float) -> float:
    """The probability, to some digits, and never 0: the page takes its logarithm."""
    return max(float(f"{math.exp(log_probability):.6g}"), 1e-30)


# ------------------------------------------------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    """One model for all who ask; each request has a thread, and the texts take turns token by token.

    Args:
        host: the address to listen at.
        port: 0 takes a free one.
        model: writes the texts.
        tokenizer: the model's.
        info: what `lm.generate.load` says of the model.
        compile: use torch.compile for each further token.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        model: TransformerLM,
        tokenizer: Tokenizer,
        info: dict[str, Any],
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.compile = model, tokenizer, compile
        run = Path(info["path"]).resolve().parent.parent
        self.facts = {
            "name": f"{run.parent.name}/{run.name}",
            "card": describe(model, info).partition(": ")[2] + f", context {model.config.context_length} tokens",
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        self.page = PAGE.read_bytes()
        self.policy = content_policy(self.page.decode())
        self.turn = threading.Lock()
        self.places = threading.Semaphore(MAX_TEXTS)
        self.stopping = threading.Event()
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Without the look-up of our own name that HTTPServer makes here, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def address(self) -> str:
        """What to type into the browser."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def write(self, request: Request) -> Iterator[dict[str, Any]]:
        """The text that a request asks for, piece by piece, and at the end how much it was.

        Raises:
            ValueError: at once, if the model cannot go on from there.
        """
        sampling, stop_id = request.sampling, end_of_text_id(self.tokenizer)
        steps = sample_tokens(
            self.model,
            [*encode_prompt(self.tokenizer, request.prompt), *request.token_ids],
            sampling,
            forced_ids=request.forced_ids,
            barred_ids=ids_without_token(self.model, self.tokenizer),
            num_alternatives=NUM_ALTERNATIVES,
            compile=self.compile,
        )

        def events() -> Iterator[dict[str, Any]]:
            began, num_tokens = time.perf_counter(), 0
            written = pieces(self.tokenizer, self.in_turn(steps), stop_id)
            for event in until_stop(self.tokenizer, written, request.stop):
                num_tokens += len(event["tokens"])
                yield event
            yield {"num_tokens": num_tokens, "seconds": time.perf_counter() - began, "seed": sampling.seed}

        return events()

    def in_turn(self, steps: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
        """Take a step when no other text does, until the server stops."""
        while not self.stopping.is_set():
            with self.turn:
                samples = next(steps, None)
            if samples is None:
                return
            yield samples

    def stop(self, patience: float = 5.0) -> None:
        """Let the texts that are being written end after their next token."""
        self.stopping.set()
        deadline = time.monotonic() + patience
        for _ in range(MAX_TEXTS):
            self.places.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that is gone is no error; anything else is told on stderr."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def content_policy(page: str) -> str:
    """The page may run its own script and style, talk to this server, and nothing else."""
    allowed = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind in ("script", "style"):
        for content in re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            allowed.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join([*allowed, "frame-ancestors 'none'"])


class Handler(BaseHTTPRequestHandler):
    """Answers one request, then closes the connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lm", ""
    timeout = 30  # seconds without a byte from the browser, or that it takes none

    def do_GET(self) -> None:
        """The page, or what it says of the model."""
        if self.is_foreign():
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self.reply(200, self.server.page, "text/html; charset=utf-8")
        elif path == "/model":
            self.reply(200, json.dumps(self.server.facts).encode())
        else:
            self.send_error(404, f"there is no {path} here")

    do_HEAD = do_GET  # `reply` leaves out the body

    def do_POST(self) -> None:
        """A text, written while it is read; when the browser goes away, the writing ends."""
        body = self.read_body()
        if body is None or self.is_foreign():
            return
        if self.path != "/generate":
            self.send_error(404, f"there is no {self.path} here")
            return
        if self.headers.get_content_type() != "application/json":  # no other page can send this without asking first
            self.send_error(415, "the body must be application/json")
            return
        try:
            events = self.server.write(read_request(body))
        except ValueError as error:
            self.send_error(400, str(error))
            return
        if not self.server.places.acquire(blocking=False):
            self.send_error(503, f"{MAX_TEXTS} texts are being written: try again when one is done")
            return
        try:
            self.stream(events)
        finally:
            self.server.places.release()

    def stream(self, events: Iterator[dict[str, Any]]) -> None:
        """Send one line for each event as it comes, in chunks: an answer that breaks off does not look like a whole."""
        self.send_head(200, "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def read_body(self) -> bytes | None:
        """The request's body; None, and the answer is given, if it is too large, cut off, or its length unknown."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self.send_error(411, "the body's length must be given")
            return None
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            self.send_error(413, f"the body must have at most {MAX_BODY_BYTES:,} bytes")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.send_error(400, f"the body breaks off after {len(body):,} of {int(length):,} bytes")
            return None
        return body

    def is_foreign(self) -> bool:
        """Refuse a request under a name that is not ours, or from a page that is not ours."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not is_own_name(host, self.server.host):
            self.send_error(403, "this server is not known by that name: use its address, or localhost")
        elif origin is not None and origin != f"http://{host}":
            self.send_error(403, "another page may not use this server")
        else:
            return False
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One line of JSON."""
        self.reply(code, json.dumps({"error": message or self.responses[code][0]}).encode() + b"\n")

    def reply(self, code: int, content: bytes, content_type: str = "application/json") -> None:
        """A whole answer; to HEAD, all but its body."""
        self.send_head(code, content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_head(self, code: int, content_type: str) -> None:
        """What every answer begins with."""
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page shows it all."""


def is_own_name(host: str, listening: str) -> bool:
    """Whether a Host header names this server: by an address, as localhost, or as it was told to listen.

    >>> [is_own_name(host, "127.0.0.1") for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "evil.example", "")]
    [True, True, True, False, False]
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in ("localhost", listening.lower()):
        return True
    return is_address(name)


def is_address(name: str) -> bool:
    """Whether a name is an IP address: such a name cannot be made to mean another."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ the command


def run(
    ckpt: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    tokenizer: Path | None = None,
    compile: bool = False,
    logs: Path = Path("logs"),
) -> None:
    """Serve a page on this machine where a trained model writes; Ctrl-C ends it.

    Args:
        ckpt: a checkpoint file or a run directory; default, the newest run. Of a run, the best checkpoint.
        host: the address to listen at. Any other than the loopback one lets other machines use the model.
        port: where; 0 takes a free one.
        device: cpu, cuda, mps, ...; auto takes a CUDA GPU where there is one.
        tokenizer: its directory; default, the copy in the run directory.
        compile: use torch.compile for each further token: the first takes up to a minute on a CPU.
        logs: where the runs are.

    Raises:
        ValueError: the address cannot be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} must be in [0, 65535]: 0 takes a free one")
    model, loaded, info = load(ckpt, logs, tokenizer, device)
    try:
        server = Server(host, port, model, loaded, info, compile)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port={port} is in use: choose another, or --port 0 for a free one") from None
        raise ValueError(f"host={host}, port={port}: {error.strerror or error}") from None
    with server:
        if not (host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)):
            print(f"warning: everyone who can reach {host} can use this model", file=sys.stderr)
        print(f"{describe(model, info)}\n{server.address}   Ctrl-C ends", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            server.stop()
            print("\nstopped", file=sys.stderr)
