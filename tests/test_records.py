"""What the committed records of computations say is what their commands print."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = [ROOT / "logs" / name / "REPORT.md" for name in ("accounting", "learning_rate_tuning")]
ACCOUNTS = re.findall(r"```console\n\$ python -m lm (account .*)\n((?s:.)*?)```", RECORDS[0].read_text())


def test_accounts_are_what_their_commands_print() -> None:
    """All in one process of their own: here the run-time type checks would stand between."""
    script = "import sys; from lm.__main__ import main\nfor line in sys.argv[1:]: print('$', line); main(line.split())"
    printed = subprocess.run(
        [sys.executable, "-c", script, *(command for command, _ in ACCOUNTS)],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pages = re.findall(r"\$ (account .*)\n((?s:.)*?)(?=^\$ |\Z)", printed, re.MULTILINE)
    assert len(pages) == len(ACCOUNTS) > 0
    for (command, output), (_, recorded) in zip(pages, ACCOUNTS, strict=True):
        assert output.rstrip() == recorded.rstrip(), f"run `python -m lm {command}` and put its output into the record"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_examples_of_a_record_give_its_figures(path: Path) -> None:
    failures, examples = doctest.testfile(str(path), module_relative=False)
    assert examples
    assert not failures


def test_every_problem_of_the_assignment_is_answered_in_order() -> None:
    text = (ROOT / "logs" / "WRITEUP.md").read_text()
    problems = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert len(set(problems)) == len(problems) == 38
    assert (problems[0], problems[-1]) == ("unicode1", "leaderboard")


def test_what_the_write_up_names_exists() -> None:
    text = (ROOT / "logs" / "WRITEUP.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    for link in links:
        assert (ROOT / "logs" / link).exists(), link
    files = re.findall(r"`((?:lm|tokenizer|tests|configs)/[\w/.]+)`", text)
    files += re.findall(r"--config (configs/[\w/.]+)|sweep (configs/[\w/.]+)", text)
    for names in files:
        for name in [names] if isinstance(names, str) else filter(None, names):
            assert (ROOT / name).exists(), name
