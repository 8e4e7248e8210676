"""What the committed records of computations say is what their commands print."""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lm.report import report

ROOT = Path(__file__).parents[1]
RECORDS = [ROOT / "logs" / name / "REPORT.md" for name in ("accounting", "learning_rate_tuning")]
ACCOUNTS = re.findall(r"```console\n\$ python -m lm (account .*)\n((?s:.)*?)```", RECORDS[0].read_text())


@pytest.mark.slow
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


STUDIES = sorted(
    {ROOT / "logs" / path.relative_to(ROOT / "logs").parts[0] for path in ROOT.glob("logs/**/metrics.jsonl")}
)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_report_is_what_its_run_files_give(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for plot in ("plot_curves", "plot_final_loss", "plot_ranking"):
        monkeypatch.setattr(f"lm.report.{plot}", lambda *_: [])
    copy = tmp_path / "logs" / study.name
    shutil.copytree(study, copy)
    (copy / "REPORT.md").unlink()
    monkeypatch.chdir(tmp_path)
    report(study.name)
    assert (copy / "REPORT.md").read_bytes() == (study / "REPORT.md").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "study", [ROOT / "logs" / name for name in ("real_text", "learning_rate")], ids=lambda p: p.name
)
def test_pictures_are_what_the_run_files_give(study: Path, tmp_path: Path) -> None:
    """Byte for byte, by the same version of the library that drew them."""
    version = pytest.importorskip("matplotlib").__version__
    shutil.copytree(study, tmp_path / study.name)
    report(study.name, logs=str(tmp_path))
    pictures = sorted(study.glob("*.svg"))
    assert pictures
    for picture in pictures:
        if f"Matplotlib v{version}" not in picture.read_text():
            pytest.skip(f"{picture.name} was drawn by another version than {version}")
        assert (tmp_path / study.name / picture.name).read_bytes() == picture.read_bytes()


def test_every_problem_of_the_assignment_is_answered_in_order() -> None:
    text = (ROOT / "logs" / "WRITEUP.md").read_text()
    problems = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert len(set(problems)) == len(problems) == 38
    assert (problems[0], problems[-1]) == ("unicode1", "leaderboard")


PAGES = [ROOT / "README.md", *sorted((ROOT / "logs").glob("*.md")), *sorted((ROOT / "logs").glob("*/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    """Its links, the project's files, and the configs, which tests/test_configs.py puts through the command line."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    files = re.findall(r"`((?:lm|tokenizer|tests|configs)/[\w/.]+)`", text)
    files += re.findall(r"--config (configs/[\w/.]+)|sweep (configs/[\w/.]+)", text)
    for names in files:
        for name in [names] if isinstance(names, str) else filter(None, names):
            assert (ROOT / name).exists(), name
