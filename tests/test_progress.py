"""Progress is reported where it is asked for, in lines that say how fast and how long."""

import re

from tokenizer import progress
from tokenizer.progress import progress_bar


def test_silent_unless_asked(capsys) -> None:
    with progress_bar("counting", 10, "bytes", False) as show:
        show(10)
    assert capsys.readouterr().err == ""


def test_lines_with_rate_and_time_left(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar("counting", 4_000_000, "bytes", True) as show:
        show(1_000_000)
        show(4_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"counting: 25%, 1 MB, \d+ MB/s, \d+ s left", lines[0])
    assert re.fullmatch(r"counting: 4 MB, \d+ MB/s, \d+ s", lines[-1])


def test_lines_without_a_known_total(capsys) -> None:
    with progress_bar("merging", None, "merges", True) as show:
        show(7)
    assert re.fullmatch(r"merging: 7 merges, \d+ s\n", capsys.readouterr().err)


def test_a_bar_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for unit in ("bytes", "merges"):
        with progress_bar("counting", 4, unit, False) as show:
            show(2)
    assert "Traceback" not in capsys.readouterr().err
