"""The benchmark: it measures what it says, notices results that differ, and keeps earlier results."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
from timing import ALMOST_LINEAR, slope_of

from tokenizer import bench, rivals, synthetic

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 9))) for _ in range(12000)]
    lines = [" ".join(draw.choices(words, k=60)) + draw.choice([".\n", "!\n", f",\n{END}\n"]) for _ in range(2000)]
    path = tmp_path_factory.mktemp("bench") / "text.txt"
    path.write_text("".join(lines))
    return path


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def record(entry: str, seconds: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    size = {"num_bytes": {stage: 1000 for stage in seconds}, "peak_bytes": [1_000_000], "note": "", "agreement": ""}
    return {"entry": entry, "threads": 1, "seconds": seconds} | size | more


@pytest.mark.slow
def test_a_run_measures_compares_and_reports(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tiktoken")
    output = (tmp_path / "out.json", tmp_path / "out.md")
    common = ["--file", text, "--vocab_size", 300, "--threads", 1, "--repeats", 1, "--json", output[0]]
    bench.run(parse(*common, "--tasks", "first-use", "--rivals", "--train_mb", 0.1))
    first = json.loads(output[0].read_text())["tasks"]["first-use"]
    assert [r["entry"] for r in first["records"]] == ["ours, kernels cached", "ours, kernels compiled"]
    assert first["num_bytes"] <= 100_000
    assert all(seconds > 0 for r in first["records"] for times in r["seconds"].values() for seconds in times)
    assert {r["agreement"] for r in first["records"][1:]} == {"same merges"}

    bench.run(parse(*common, "--tasks", "encode", "decode", "--rivals", "tiktoken", "--markdown", output[1]))
    results = json.loads(output[0].read_text())
    assert results["tasks"]["first-use"] == first, "a task that was not run again keeps its results"
    ours, theirs = results["tasks"]["encode"]["records"]
    assert theirs["entry"] == "tiktoken" and theirs["agreement"] == "same ids"
    assert ours["peak_bytes"][0] > 10_000_000
    page = output[1].read_text()
    assert page in capsys.readouterr().out + "\n"
    assert "## first-use" in page and "## decode" in page and results["machine"]["processor"] in page
    assert str(tmp_path) not in page and str(text.parent) not in page


def test_a_run_that_fails_is_a_row(text: Path, tmp_path: Path) -> None:
    job = {"task": "decode", "rival": "ours", "file": text, "tokenizer": tmp_path / "absent", "scratch": tmp_path}
    result = bench.measure(
        {**{k: str(v) for k, v in job.items()}, "threads": 1, "vocab_size": 300, "limit_seconds": 60}
    )
    assert "absent" in result["error"]
    job = {"task": "train", "rival": "ours", "file": text, "tokenizer": tmp_path, "scratch": tmp_path}
    slow = bench.measure(
        {**{k: str(v) for k, v in job.items()}, "threads": 1, "vocab_size": 300, "limit_seconds": 0.01}
    )
    assert slow == {"error": "not done in 0.01 s"}
    row = record("ours", {}, error=result["error"])
    assert "| ours | 1 | failed |" in "\n".join(bench.table("decode", {"records": [row]}))


def test_results_that_differ_are_told() -> None:
    assert bench.agreement("encode", {"digest": "1"}, {"digest": "1"}) == "same ids"
    assert bench.agreement("encode", {"digest": "1"}, {"digest": "2"}) == "OTHER IDS"
    ours = {"merges": [["61", "62"], ["6162", "63"]], "tokens": ["6162", "616263"]}
    assert bench.agreement("train", ours, ours) == "same merges"
    other = {"merges": [["61", "62"], ["63", "64"]], "tokens": []}
    assert bench.agreement("train", ours, other) == "first 1 merges the same, 50.0 % of the tokens"
    assert bench.agreement("train", ours, {"merges": [], "tokens": ["6162"]}) == "50.0 % of the tokens"


def test_what_is_kept_of_a_record() -> None:
    run = {"seconds": {"": 2.0}, "num_bytes": {"": 1000}, "peak_bytes": 1_000_000, "note": "", "digest": None}
    kept = bench.Record("ours", 1)
    kept.add(run)
    assert kept.to_json() == record("ours", {"": [2.0]})
    kept.add(run)
    kept.error, kept.spent_seconds = "not done in 1 s", 9.0
    assert kept.to_json() == record("ours", {"": [2.0, 2.0]}, peak_bytes=[1_000_000] * 2, error="not done in 1 s")


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down after the first round changes the seconds, not the ratio."""
    ours = record("ours", {"": [1.0, 4.0, 4.0]})
    theirs = record("other", {"": [3.0, 12.0]})
    assert bench.ratio_to_ours(theirs, ours, "") == "3.00x"
    assert bench.ratio_to_ours(ours, ours, "") == ""
    theirs["num_bytes"] = {"": 100}  # a tenth of the text
    assert bench.ratio_to_ours(theirs, ours, "") == "30.00x"


def test_slope_of_linear_and_quadratic_time() -> None:
    lengths = rivals.RUN_LENGTHS
    for power in (1, 2):
        seconds = {f"{n:,} x letter": [1e-9 * n**power] for n in lengths}
        row = record("ours", seconds)
        row["num_bytes"] = dict(zip(seconds, lengths, strict=True))
        assert bench.slope(row, "letter") == f"letter: slope {power}.00"


def test_bad_options_are_refused(text: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        bench.run(parse("--file", "absent.txt"))
    with pytest.raises(ValueError, match="--threads"):
        bench.run(parse("--file", text, "--threads", 0))
    with pytest.raises(ValueError, match="--repeats"):
        bench.run(parse("--file", text, "--repeats", 0))


@pytest.mark.slow
def test_generated_text_depends_on_nothing_but_its_arguments(text: Path, tmp_path: Path) -> None:
    """The same bytes with 1 and 2 threads; distinct pre-tokens grow with the length where new words are drawn."""
    from tokenizer.pretokenize import count_pretokens

    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    size = 3 * synthetic.BLOCK // 8
    synthetic.write_text(paths[0], "owt-scale", text, size, num_threads=1)
    synthetic.write_text(paths[1], "owt-scale", text, size, num_threads=2)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert abs(paths[0].stat().st_size - size) < 1000
    synthetic.write_text(paths[2], "tinystories-scale", text, size, num_threads=2)
    synthetic.write_text(paths[3], "owt-scale", text, size // 8, num_threads=2)
    distinct = [len(count_pretokens(path, [END]).counts) for path in paths]
    assert distinct[0] > 2 * distinct[3] > 2 * distinct[2]


def test_a_text_that_does_not_fit_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower --scale_gb"):
        synthetic.write_text(tmp_path / "x.txt", "owt-scale", text, 10**16, num_threads=1)


def test_a_kept_text_is_used_again(text: Path, tmp_path: Path) -> None:
    options = parse("--file", text, "--scale_gb", 0.001, "--keep", tmp_path)
    path = bench.prepare_text("tinystories-scale", options, tmp_path / "scratch")
    assert path.parent == tmp_path and path.stat().st_size > 900_000
    path.write_text("mine")
    assert bench.prepare_text("tinystories-scale", options, tmp_path / "scratch").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("power", "linear"), [(1.0, True), (2.0, False)])
def test_the_slope_of_time_tells_linear_from_steeper(power: float, linear: bool) -> None:
    """What the other tests of time rest on: it neither takes steep growth for linear nor the other way round."""
    slope = slope_of(lambda n: sum(range(int(3e6 * (n / 1000) ** power))), 100, 1000)
    assert (slope < ALMOST_LINEAR) == linear
