"""`python -m tokenizer` as a user calls it: in processes of its own, and in this one where only the answer matters."""

import errno
import itertools
import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tokenizer import Tokenizer, reference
from tokenizer.__main__ import main
from tokenizer.files import atomic_write
from tokenizer.options import in_one_line
from tokenizer.show import colour_tokens, print_tokens
from tokenizer.stats import longest_tokens, overlap, text_stats, unshared

END = "<|endoftext|>"
TEXT = f"low low lower newest\n{END}\nwidest it's über 😀 <b>&\n{END}\n" * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer(*reference.train_bpe(TEXT, 280, [END]), [END]).save(tmp_path / "tok")
    return tmp_path / "tok"


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenizer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


class TestHelp:
    @pytest.mark.parametrize("verb", ["train", "encode", "decode", "stats", "show", "export", "bench"])
    def test_each_verb_explains_itself(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert f"usage: python -m tokenizer {verb}" in shown
        assert len(shown.splitlines()) > 8

    def test_starts_without_heavy_imports(self) -> None:
        code = (
            "import sys; from tokenizer.__main__ import main\n"
            "try: main(['--help'])\n"
            "except SystemExit: assert not {'numba', 'torch', 'rich', 'numpy', 'regex'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def test_that_nobody_reads_is_no_error(self) -> None:
        words = f"{shlex.quote(sys.executable)} -m tokenizer --help | true"
        command = ["bash", "-o", "pipefail", "-c", words]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    def test_bad_usage_is_exit_code_2(self) -> None:
        for arguments in ((), ("fly",), ("encode",), ("train", "x", "--vocab_size", "many", "--output", "y")):
            with pytest.raises(SystemExit) as left:
                main(list(arguments))
            assert left.value.code == 2

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("", "missing VERB: `python -m tokenizer --help` says more"),
            ("trian a.txt", "'trian' is no command: did you mean train?"),
            ("--hlp", "--hlp is no option: did you mean --help?"),
            ("encode a.txt --tokeniser tok", "--tokeniser is no option: did you mean --tokenizer?"),
            ("encode a.txt --tokeniser=tok", "--tokeniser is no option: did you mean --tokenizer?"),
            ("encode a.txt --tok tok", "--tok is no option: did you mean --tokenizer?"),
            ("show a -y --tokenizer tok", "-y is no option: `--help` lists what there is"),
            ("encode a.txt", "missing --tokenizer: `python -m tokenizer encode --help` says more"),
            ("train a.txt --vocab_size many --output tok", "--vocab_size: 'many' must be int"),
            (
                "encode a.txt --tokenizer tok --errors stric",
                "--errors: 'stric' must be one of strict, replace: did you mean strict?",
            ),
            ("export hff --tokenizer tok", "format: 'hff' must be one of hf, tiktoken, gpt2: did you mean hf?"),
            ("show a b --tokenizer tok", "'b' is one word too many: a value with blanks in it goes in quotes"),
            ("encode a.txt --tokenizer", "--tokenizer: expected one argument"),
            (
                "train --special_tokens <|a|> a.txt --vocab_size 260 --output tok",
                "missing TEXT: --special_tokens takes every word after it, so put TEXT before it",
            ),
        ],
    )
    def test_bad_usage_is_one_line(self, command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main(command.split())
        assert left.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"

    def test_words_that_look_like_options_are_texts_after_two_dashes(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["show", "--tokenizer", str(folder), "--", "--low"]) == 0
        assert "low" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("verb", "words"),
        [
            ("train", ["(default: strict)", "(default: <|endoftext|>)", "default: one per processor"]),
            ("bench", ["Measure this tokenizer", "(default: 3)", "(default: 900)", "(default: 32000)"]),
        ],
    )
    def test_help_has_the_defaults(self, verb: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert [phrase for phrase in words if phrase not in shown] == []


class TestWholePath:
    def test_train_encode_decode(self, text: Path, tmp_path: Path) -> None:
        trained = run(
            "train", text, "--vocab_size", 280, "--output", tmp_path / "tok", "--special_tokens", END, "<|x|>"
        )
        assert (trained.returncode, trained.stderr) == (0, "")
        tokenizer = Tokenizer.from_directory(tmp_path / "tok")
        assert tokenizer.special_tokens == [END, "<|x|>"]
        assert tokenizer.merges == reference.train_bpe(TEXT, 280, [END, "<|x|>"])[1]

        encoded = run("encode", text, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "data" / "train.npy")
        assert encoded.returncode == 0
        assert "uint16 ids" in encoded.stdout
        assert np.load(tmp_path / "data" / "train.npy").tolist() == tokenizer.encode(TEXT)
        record = json.loads((tmp_path / "data" / "meta.json").read_text())["splits"]["train"]
        assert (record["num_documents"], record["num_bytes"]) == (40, len(TEXT.encode()))

        decoded = tmp_path / "decoded.txt"
        source = tmp_path / "data" / "train.npy"
        assert run("decode", source, "--tokenizer", tmp_path / "tok", "--output", decoded).returncode == 0
        assert decoded.read_bytes() == text.read_bytes()
        printed = subprocess.run(
            [sys.executable, "-m", "tokenizer", "decode", source, "--tokenizer", tmp_path / "tok"], capture_output=True
        )
        assert printed.stdout == text.read_bytes()

    def test_ids_printed_are_ids_read(
        self, text: Path, folder: Path, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        assert main(["encode", str(text), "--tokenizer", str(folder)]) == 0
        ids = capsysbinary.readouterr().out.decode().split()
        assert main(["decode", *ids, "--tokenizer", str(folder)]) == 0
        assert capsysbinary.readouterr().out == TEXT.encode()

    def test_shards(self, text: Path, folder: Path, tmp_path: Path) -> None:
        for number in (1, 2):
            output = tmp_path / f"{number}.npy"
            arguments = ["encode", text, "--tokenizer", folder, "--output", output, "--shard", f"{number}/2"]
            assert main([*map(str, arguments)]) == 0
        ids = np.concatenate([np.load(tmp_path / f"{number}.npy") for number in (1, 2)])
        assert ids.tolist() == Tokenizer.from_directory(folder).encode(TEXT)


class TestBadInput:
    def test_one_line_and_exit_code_2(
        self, text: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.txt").write_bytes(b"ok \xff")
        (tmp_path / "bad.json").write_text("{")
        np.save(tmp_path / "floats.npy", np.zeros(3))
        (tmp_path / "empty.npy").touch()
        with open(tmp_path / "several.npy", "wb") as file:
            np.savez(file, a=np.zeros(3, np.uint16))
        np.save(tmp_path / "torn.npy", np.zeros(3, np.uint16))
        torn = (tmp_path / "torn.npy").read_bytes().replace(b"(3,)", b"(3,(")
        (tmp_path / "torn.npy").write_bytes(torn)
        output = tmp_path / "x.npy"
        for arguments, cause in (
            (["encode", tmp_path / "bad.txt", "--tokenizer", folder, "--output", output], "byte 3"),
            (["encode", tmp_path / "no.txt", "--tokenizer", folder, "--output", output], "no.txt"),
            (["encode", text, "--tokenizer", tmp_path / "no", "--output", output], "python -m tokenizer train"),
            (["encode", text, "--tokenizer", tmp_path / "bad.json", "--output", output], "bad.json"),
            (["encode", text, "--tokenizer", folder, "--output", output, "--shard", "3"], "shard="),
            (["encode", text, "--tokenizer", folder, "--output", tmp_path / "x.bin"], ".npy"),
            (["decode", "999999", "--tokenizer", folder], "999999"),
            (["encode", text, "--tokenizer", folder, "--shard", "1/2"], "needs --output"),
            (["decode", "9" * 30, "--tokenizer", folder], "9" * 30),
            (["decode", tmp_path / "empty.npy", "--tokenizer", folder], "empty.npy is no .npy file"),
            (["decode", tmp_path / "several.npy", "--tokenizer", folder], "several.npy is no .npy file"),
            (["decode", tmp_path / "torn.npy", "--tokenizer", folder], "torn.npy is no .npy file"),
            (["decode", "low", "--tokenizer", folder], "'low'"),
            (["decode", tmp_path / "floats.npy", "--tokenizer", folder], "float64"),
            (["train", text, "--vocab_size", "10", "--output", tmp_path / "t"], "vocab_size"),
            (["train", text, "--vocab_size", "300", "--special_tokens", "a", "a", "--output", tmp_path / "t"], "'a'"),
        ):
            assert main([*map(str, arguments)]) == 2, arguments
            err = capsys.readouterr().err
            assert err.startswith("error: ")
            assert cause in err
            assert err.count("\n") == 1
        assert not output.exists()

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("train nope.txt --vocab_size 260 --output new", "nope.txt: there is no such file"),
            ("encode nope --tokenizer tok", "nope: there is no such file"),
            ("encode text.txt --tokenizer text.txt", "text.txt is a file, not a folder"),
            ("train text.txt --vocab_size 260 --output text.txt", "text.txt is a file, not a folder"),
            ("export hf --tokenizer tok --output text.txt/x/y.json", "text.txt is a file, not a folder"),
            ("export tiktoken --tokenizer tok --output full", "full is a folder, not a file"),
            ("encode text.txt --tokenizer tok --output full.npy", "full.npy is a folder, not a file"),
            ("encode text.txt --tokenizer tok --num_threads 0", "num_threads=0 must be at least 1"),
            ("encode text.txt --tokenizer tok --num_threads -2 --output x.npy", "num_threads=-2 must be at least 1"),
            ("train text.txt --vocab_size 260 --output new --num_threads 0", "num_threads=0 must be at least 1"),
            (
                "train text.txt --vocab_size 260 --output new --special_tokens <|a|> text.txt",
                "--special_tokens takes every word after it, so put text.txt before it",
            ),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said_in_words(
        self,
        text: Path,
        folder: Path,
        tmp_path: Path,
        command: str,
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full.npy").mkdir()
        assert main(command.split()) == 2
        said = capsys.readouterr().err.replace(f"{tmp_path.resolve()}/", "")
        assert said == f"error: {message}\n"
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device"),
            (OSError(errno.EACCES, "Permission denied", b"x"), "x: Permission denied"),
            (OSError(errno.EXDEV, "Invalid cross-device link", ".x.part", None, "x"), "x: Invalid cross-device link"),
            (OSError(errno.EADDRINUSE, "Address already in use"), "Address already in use"),
            (OSError("not a\ngzipped file"), "not a gzipped file"),
            (ValueError("two\nlines"), "two lines"),
        ],
    )
    def test_other_errors_keep_the_systems_words(self, error: Exception, said: str) -> None:
        assert in_one_line(error) == said

    def test_a_file_that_may_not_be_written_is_called_by_its_own_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(part: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(part))

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(PermissionError) as refused, atomic_write(tmp_path / "x.json"):
            pass
        assert refused.value.filename == str(tmp_path / "x.json")

    def test_a_process_says_the_same(self, folder: Path) -> None:
        done = run("decode", "999999", "--tokenizer", folder)
        assert done.returncode == 2
        assert done.stderr == "error: token id 999999 is not in the vocabulary (ids 0 to 279)\n"

    def test_no_more_threads(
        self, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        large = tmp_path / "large.txt"
        large.write_bytes(text.read_bytes() * 2000)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert main(["train", str(large), "--vocab_size", "280", "--output", str(tmp_path / "t")]) == 2
        assert "smaller --num_threads" in capsys.readouterr().err

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_closed_streams_are_empty_ones(self, text: Path, folder: Path, tmp_path: Path, closed: str) -> None:
        for words in (f"encode {text} --output {tmp_path}/x.npy", "show low"):
            command = f"{sys.executable} -m tokenizer {words} --tokenizer {folder} {closed}"
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
        assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["x.npy"]
        assert not list(tmp_path.glob(".x.npy*"))

    def test_a_tokenizer_does_not_go_into_a_dataset(self, text: Path, folder: Path, tmp_path: Path) -> None:
        assert main(["encode", str(text), "--tokenizer", str(folder), "--output", str(tmp_path / "d" / "x.npy")]) == 0
        assert main(["train", str(text), "--vocab_size", "280", "--output", str(tmp_path / "d")]) == 2

    def test_a_reader_that_stops_early_is_no_error(self, text: Path, folder: Path) -> None:
        command = f"{sys.executable} -m tokenizer encode {text} {text} --tokenizer {folder} | head -c 10"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert done.stderr == ""

    def test_interrupted_is_130(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Tokenizer, "encode", interrupt)
        assert main(["show", "low", "--tokenizer", str(folder)]) == 130
        assert capsys.readouterr().err == "interrupted\n"


class TestLooking:
    def test_show_cuts_where_encode_does(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_directory(folder)
        tokens = list(colour_tokens(tokenizer, TEXT))
        assert [token_id for token_id, _, _ in tokens] == tokenizer.encode(TEXT)
        assert all(a[2] != b[2] for a, b in itertools.pairwise(tokens) if -1 not in (a[2], b[2]))
        assert "".join(shown for _, shown, _ in tokens).startswith("low low lower")

    def test_show_prints(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", "low [b]lower[/b] 😀", "--tokenizer", str(folder)]) == 0
        shown = capsys.readouterr().out
        smile = Tokenizer.from_directory(folder)
        print_tokens(Tokenizer(smile.vocab, smile.merges, [":smile:"]), ":smile:")
        assert ":smile:" in capsys.readouterr().out
        assert shown.replace("|", "").startswith("low [b]lower[/b] ")
        assert shown.count("|") > 5

    def test_page_needs_nothing_else(self, folder: Path, tmp_path: Path) -> None:
        page = tmp_path / "x.html"
        assert main(["show", f"<b>low</b> & 'x' {END}", "--tokenizer", str(folder), "--html", str(page)]) == 0
        content = page.read_text()
        assert "<b>" not in content
        assert "&lt;" in content
        assert not [part for part in ("http", "src=", "<script", "@import", "url(") if part in content]

    def test_stats(self, text: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tokenizer = Tokenizer.from_directory(folder)
        figures = text_stats(tokenizer, text)
        ids = tokenizer.encode(TEXT)
        ends = [i for i, token in enumerate(ids) if token == 0]
        lengths = [b - a - 1 for a, b in zip([-1, *ends], ends, strict=False)]
        assert figures["num_tokens"] == len(ids)
        assert figures["bytes_per_token"] == pytest.approx(len(TEXT.encode()) / len(ids))
        assert figures["tokens_used"] == len(set(ids))
        assert figures["tokens_per_document"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert figures["tokens_per_document"]["longest"] == max(lengths)
        assert overlap(tokenizer, tokenizer) == 1
        longest = longest_tokens(tokenizer)
        assert len(longest[0]) == max(len(a + b) for a, b in tokenizer.merges)
        assert main(["stats", str(text), "--tokenizer", str(folder), "--other", str(folder / "tokenizer.json")]) == 0
        shown = capsys.readouterr().out
        assert "bytes per token" in shown
        assert "100.0%" in shown

    def test_stats_of_sampled_documents(self, folder: Path, tmp_path: Path) -> None:
        tokenizer = Tokenizer.from_directory(folder)
        documents = ["low lower" * n for n in range(1, 40)]
        (tmp_path / "few.txt").write_text(END.join(documents[:3]))
        few = text_stats(tokenizer, tmp_path / "few.txt")["sampled_bytes_per_token"]
        num_tokens = sum(len(tokenizer.encode(document)) for document in documents[:3])
        assert few == pytest.approx(sum(map(len, documents[:3])) / num_tokens)
        (tmp_path / "many.txt").write_text(END.join(documents))
        bytes_only = Tokenizer({**tokenizer.vocab}, [], tokenizer.special_tokens)
        many = text_stats(bytes_only, tmp_path / "many.txt")
        assert many["sampled_bytes_per_token"] == 1
        assert many["bytes_per_token"] > 1, "the separators are single tokens, and belong to no document"

    def test_stats_say_what_is_not_shared(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_directory(folder)
        kept = {token: word for token, word in tokenizer.vocab.items() if word != b"".join(tokenizer.merges[-1])}
        less = Tokenizer(kept, tokenizer.merges[:-1], tokenizer.special_tokens)
        assert unshared(tokenizer, less) == [b"".join(tokenizer.merges[-1])]
        assert unshared(less, tokenizer) == []

    def test_stats_of_an_empty_text(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("")
        figures = text_stats(Tokenizer.from_directory(folder), tmp_path / "empty.txt")
        assert (figures["num_tokens"], figures["tokens_per_document"]["mean"]) == (0, 0)

    def test_export_and_back(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for kind, target, loadable in (
            ("hf", tmp_path / "x.json", tmp_path / "x.json"),
            ("tiktoken", tmp_path / "x.tiktoken", tmp_path / "x.tiktoken"),
            ("gpt2", tmp_path / "pair", tmp_path / "pair"),
        ):
            assert main(["export", kind, "--tokenizer", str(folder), "--output", str(target)]) == 0
            capsys.readouterr()
            assert main(["show", TEXT[:40], "--tokenizer", str(loadable)]) == 0
            exported = capsys.readouterr().out
            assert main(["show", TEXT[:40], "--tokenizer", str(folder)]) == 0
            assert capsys.readouterr().out == exported


def test_the_same_documents_are_sampled_each_time(tmp_path: Path) -> None:
    vocab = dict(enumerate([b"<|endoftext|>", *(bytes([i]) for i in range(256)), *(b"a" * n for n in range(2, 33))]))
    tokenizer = Tokenizer(vocab, [(b"a" * n, b"a") for n in range(1, 32)], ["<|endoftext|>"])
    (tmp_path / "x.txt").write_text("<|endoftext|>".join("ab" * n + "a" * (40 - n) for n in range(40)))
    figures = [text_stats(tokenizer, tmp_path / "x.txt")["sampled_bytes_per_token"] for _ in range(3)]
    assert len(set(figures)) == 1
