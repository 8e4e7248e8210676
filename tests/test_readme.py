"""The README's commands, run as they stand there, in order, in one empty folder; long runs are cut to a few steps."""

import gzip
import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.control import SIGNALS
from lm.grammar import write_corpus

ROOT = Path(__file__).parents[1]

# Appended to every `python -m lm fit`: the same run, but short.
SHORT = (
    "--trainer.max_steps 4 --run.validate_every_n_steps 2 --run.sample_tokens 8 --model.schedule.warmup_steps 1 "
    "--data.batch_size 2 --data.val_batch_size 64 --data.context_length 64 --model.transformer.num_layers 1 "
    "--model.transformer.d_model 32 --model.transformer.num_heads 2 --model.transformer.d_ff 64"
)

RUN_BY_CI = ("pip install", "pytest")  # .ci/run
NEEDS_NETWORK = ("tinystories", "owt")


def readme_lines(kind: str) -> list[str]:
    """Every line in a block of this kind; continued ones as one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
    return [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]


def readme_commands() -> list[str]:
    """Every command in a `sh` block; and those that torchrun and SLURM start, as they are in each process."""
    commands = [line.split(" #")[0].strip() for line in readme_lines("sh")]
    started = [re.match(r"(?:torchrun|srun) .*?(-m lm .*)", line) for line in readme_lines("text")]
    return [command for command in commands if command] + [f"python {match[1]}" for match in started if match]


def test_the_slurm_script_asks_for_a_signal_that_a_run_heeds_and_for_its_own_return() -> None:
    directives = " ".join(line for line in readme_lines("text") if line.startswith("#SBATCH"))
    [name] = re.findall(r"--signal (SIG\w+)@\d+", directives)
    assert signal.Signals[name] in SIGNALS
    assert "--requeue" in directives
    assert "--open-mode append" in directives
    [command] = [line for line in readme_lines("text") if line.startswith("srun")]
    assert "--resume auto" in command
    assert "--run.name" in command


def test_the_readme_says_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert [line for line in readme_commands() if line.startswith("pytest")] == re.findall(r"^pytest.*$", script, re.M)


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.removeprefix("#") in headings if target.startswith("#") else (ROOT / target).exists(), target


def test_every_file_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:lm|tokenizer|tests|configs|logs)/[\w/.]+\.(?:py|yaml|md))`", text))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).is_file()]


def as_run_here(command: str) -> list[str]:
    """The command's words with this interpreter, short, and without a network."""
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else str(Path(sys.executable).parent / words[0])
    if words[0].endswith("tensorboard"):
        return [*words, "--inspect"]  # reads what the page would show, and ends
    if any(name in command for name in NEEDS_NETWORK):
        return [*words, "--print_config" if "fit" in words else "--help"]
    return words + (shlex.split(SHORT) if "fit" in words and "--print_config" not in words else [])


def run_module(words: list[str], folder: Path, output: Path) -> None:
    """`python -m words...` in this process and a folder, all that it says into a file."""
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def serve_and_interrupt(words: list[str], folder: Path) -> None:
    """Start a server, wait for its address, end it by Ctrl-C."""
    with subprocess.Popen(words, cwd=folder, text=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert any("Ctrl-C ends" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs(tmp_path: Path) -> None:
    """Each in a process of its own; a server that has imported the libraries once forks them, or imports took half."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(("my.txt", "other.txt", "notes/my.txt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_corpus(tmp_path / name, 300_000, seed)
    line = json.dumps({"text": (tmp_path / "my.txt").read_text()})
    (tmp_path / "crawl.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lm.cli"])
    for number, command in enumerate(readme_commands()):
        if command.startswith(RUN_BY_CI):
            continue
        words = as_run_here(command)
        if command.startswith("python -m lm serve"):
            serve_and_interrupt([*words, "--port", "0"], tmp_path)
        elif words[:2] == [sys.executable, "-m"]:
            output = tmp_path / f"output-{number}"
            process = processes.Process(target=run_module, args=(words[2:], tmp_path, output))
            process.start()
            process.join()
            assert process.exitcode == 0, f"{command}\n{output.read_text()[-4000:]}"
        else:
            subprocess.run(words, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    program = "\n".join(readme_lines("python"))
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
