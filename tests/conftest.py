"""What every test shares: where the reference data lies, and quiet libraries."""

import os
import signal
from pathlib import Path

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls names that jsonargparse 5 drops
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pytest workers share two cores
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as lm/__main__.py does

import pytest

# A job in the background or under nohup ignores these, and so would every process that a test starts and interrupts.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

SHARED = Path(os.environ.get("LM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of reference files (GPT-2 vocabulary, corpus.en, ...); the test skips where it is absent."""
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"reference files are not at {folder} (set LM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of compressed real text (stories-*.txt.xz, web-*.txt.xz); the test skips where it is absent."""
    folder = SHARED / "corpora"
    if not folder.is_dir():
        pytest.skip(f"corpora are not at {folder} (set LM_SHARED)")
    return folder
