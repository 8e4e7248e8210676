"""lm.bench: the rivals compute what we compute, a part that fails costs no other, and every suite gets to its page."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lm import bench, entrants
from lm.accounting import config_from_yaml
from lm.apart import LostError
from lm.bench import TINY, Part
from lm.device import peak_memory
from lm.entrants import Setting
from lm.functional import cross_entropy
from lm.measure import Keep
from lm.model import TransformerLM
from lm.rivals import BuiltinLM


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_builtin_rival_is_the_same_function(head: str) -> None:
    torch.manual_seed(0)
    ours = TransformerLM(dataclasses.replace(TINY, head=head))
    builtin = BuiltinLM.from_ours(ours)
    assert sum(p.numel() for p in builtin.parameters()) == sum(p.numel() for p in ours.parameters())
    token_ids, targets = torch.randint(60, (2, 3, 16))
    torch.testing.assert_close(builtin(token_ids), ours(token_ids), rtol=1e-4, atol=1e-5)
    theirs = F.cross_entropy(builtin(token_ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(theirs, cross_entropy(ours(token_ids), targets), rtol=1e-5, atol=1e-6)


def test_demo_is_the_built_in_run() -> None:
    assert config_from_yaml(Path(__file__).parents[1] / "configs" / "builtin.yaml") == bench.DEMO


def test_peak_memory_sees_what_is_freed_again() -> None:
    def step() -> None:
        a = torch.zeros(1_000_000)
        b = a + 1
        del a, b
        torch.zeros(500_000)

    assert peak_memory(step, torch.device("cpu")) == pytest.approx(8_000_000, rel=0.01)


def test_the_chain_can_be_learnt_to_the_loss_it_says() -> None:
    tokens = entrants.chain(300_000, 20)
    assert len(tokens) == 300_000
    table = np.zeros((20, 20))
    np.add.at(table, (tokens[:-1], tokens[1:]), 1)
    p = table / table.sum(1, keepdims=True)
    loss = -(table * np.log(np.where(p > 0, p, 1))).sum() / table.sum()
    assert loss < 2 * (1 - 2**-7) * math.log(2) + 0.05  # two followers may be the same, which makes it less
    assert loss > 0.9


def test_requests_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"only='nonsense' .* training: demo; training: base"):
        bench.run(suite="cpu", only="training; nonsense", device="cpu")
    with pytest.raises(ValueError, match="only=';' is in no name of"):
        bench.run(suite="cpu", only=";", device="cpu")
    with pytest.raises(ValueError, match="suite=gpu needs a CUDA device"):
        bench.run(suite="gpu", device="cpu")


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("training: base, bf16, compiled", ["training: base, bf16, compiled"]),
        ("CUDA graphs", [f"training: {bench.GRAPHS}"]),
        ("memory: base;curves", ["curves: base, bf16, compiled", "memory: base"]),
        (" generation: base, bf16 ; base, float32; ", ["generation: base, bf16", "training: base, float32"]),
    ],
)
def test_only_takes_whole_names_before_parts_of_them(only: str, names: list[str]) -> None:
    assert [part.name for part in bench.named(bench.SUITES["gpu"], only)] == names


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Part("generation", Setting("a", TINY, 4)), Part("memory", Setting("b", TINY, 4))]
    monkeypatch.setitem(bench.SUITES, "cpu", parts)


def empty(setting: Setting) -> dict[str, Any]:
    return {"name": setting.name, "setting": dataclasses.asdict(setting), "results": {}}


@pytest.mark.usefixtures("two_parts")
def test_a_part_that_fails_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"

    def call(function: Callable[..., Any], setting: Setting, *args: Any, **_: Any) -> dict[str, Any]:
        if setting.name == "a":
            raise LostError("its process was ended by SIGKILL")
        errors = {lost["name"]: lost["error"] for lost in json.loads(path.read_text())["failures"]}
        assert errors == {
            "generation: a": "its process was ended by SIGKILL",
            "memory: b": "the command was ended in it",
        }, "on disk before the next part begins"
        return empty(setting)

    monkeypatch.setattr(bench, "call_apart", call)
    bench.run(suite="cpu", device="cpu", json_path=path)
    result = json.loads(path.read_text())
    assert [part["name"] for part in result["memory"]] == ["b"]
    assert result["failures"] == [{"name": "generation: a", "error": "its process was ended by SIGKILL"}]
    assert "Not measured: generation: a: its process was ended by SIGKILL" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing could be measured"):
        bench.run(suite="cpu", device="cpu", only="generation")


class Machine:
    """Runs parts in no time and lets a clock tell the seconds that each takes; a part that lacks them sends some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.now = 50.0
        self.seconds = seconds
        self.given: list[tuple[str, float]] = []
        monkeypatch.setitem(bench.SUITES, "cpu", [Part("memory", Setting(name, TINY, 4)) for name in seconds])
        monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(bench, "call_apart", self.call)

    def call(
        self, function: Callable[..., Any], setting: Setting, *args: Any, seconds: float, keep: Keep
    ) -> dict[str, Any]:
        self.given.append((setting.name, seconds))
        needs = self.seconds[setting.name]
        self.now += min(needs, seconds)
        if needs <= seconds:
            return empty(setting)
        for _ in range(int(seconds // 60)):
            keep(empty(setting))
        raise LostError(f"not done after {seconds:.0f} seconds")

    def bench(self, **options: Any) -> list[tuple[str, float]]:
        """The parts that are run and the time that each is given."""
        self.given = []
        bench.run(suite="cpu", device="cpu", **options)
        return self.given


def test_the_same_command_again_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch, a=200, b=1000, c=100, d=540)
    path = tmp_path / "result.json"
    options: dict[str, Any] = {"json_path": path, "markdown_path": tmp_path / "page.md", "max_minutes": 10}
    assert machine.bench(**options) == [("a", 600), ("b", 400)]
    output = capsys.readouterr()
    assert "### Peak memory: b, 4 sequences, eager\n\n**Incomplete: not done after 400 seconds.**" in output.out
    assert "Not run yet: memory: c\n\nNot run yet: memory: d\n" in output.out
    assert "3 of 4 parts are not done: the same command again goes on with them" in output.err

    assert machine.bench(**options) == [("c", 600), ("d", 500)]
    output = capsys.readouterr()
    assert f"{path} has 1 of 4 parts" in output.err
    assert "Not run yet" not in output.out

    assert machine.bench(**options, only="c") == []
    assert machine.bench(**options) == [("b", 600)], "of what was cut off, the first in the suite"
    assert machine.bench(**options | {"max_minutes": 3}) == [("b", 180)]
    result = json.loads(path.read_text())
    assert [part["name"] for part in result["memory"]] == ["a", "b", "c", "d"], "in the order of the suite"
    assert result["memory"][1]["num_kept"] == 10, "the figures that go furthest"

    machine.seconds = dict.fromkeys("abcd", 1)
    capsys.readouterr()
    assert machine.bench(**options) == [("b", 600), ("d", 599)]
    output = capsys.readouterr()
    assert "Incomplete" not in output.out
    assert "not done" not in output.err
    page = (tmp_path / "page.md").read_text()
    (tmp_path / "page.md").unlink()
    assert machine.bench(**options) == []
    assert (tmp_path / "page.md").read_text() == page
    assert [name for name, _ in machine.bench(**options, anew=True)] == ["a", "b", "c", "d"]


def test_a_long_time_is_not_all_for_the_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, a=9000, b=9000, c=9000, d=9000)
    assert machine.bench(max_minutes=60) == [("a", 1800), ("b", 900), ("c", 600), ("d", 300)]
    machine.seconds["a"] = 20
    assert machine.bench(max_minutes=0.5, only="a") == [("a", 30)]


def test_a_command_that_is_killed_has_tried_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, a=1, b=1)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "call_apart", killed)
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        machine.bench(json_path=path)
    assert json.loads(path.read_text())["not_run"] == ["memory: b"]
    monkeypatch.setattr(bench, "call_apart", machine.call)
    assert [name for name, _ in machine.bench(json_path=path)] == ["b", "a"]


def test_figures_that_cannot_be_compared_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, a=1, b=1)
    path = tmp_path / "result.json"
    machine.bench(json_path=path)
    result = json.loads(path.read_text())
    others = [
        ({**result, "machine": {**result["machine"], "device": "Abacus"}}, "has device=Abacus, it would be .* here"),
        ({**result, "machine": {**result["machine"], "versions": {"python": "2.7"}}}, "has versions={'python': '2.7'}"),
        ({**result, "suite": "gpu"}, "has suite=gpu, it would be cpu here"),
        ({**result, "rivals": []}, r"has rivals=\[\], it would be"),
        ({**result, "memory": [{"name": "a"}]}, "has 'memory: a' in another setting"),
        ({"loss": 3}, "holds no figures of this command"),
        ([], "holds no figures of this command"),
    ]
    for other, message in others:
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"{message}.*: name another file, or replace it with --anew"):
            machine.bench(json_path=path)
        assert json.loads(path.read_text()) == other
    path.write_text(json.dumps({**result, "machine": {**result["machine"], "platform": "another kernel"}}))
    assert machine.bench(json_path=path) == [], "the same machine, which has them all"
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="in another setting"):
        machine.bench(json_path=path, rounds=99)


def test_a_rival_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class BareLoop(entrants.BareLoop):
        def __init__(self, entrant: str, *_: Any) -> None:
            self.entrant = entrant

        def run(self, steps: int) -> float:
            if self.entrant in ("transformers", fails):
                raise torch.OutOfMemoryError("CUDA out of\nmemory")
            return 1.0

    monkeypatch.setattr(entrants, "BareLoop", BareLoop)
    names: list[entrants.Entrant] = ["ours", "builtin", "transformers"]
    fails = ""
    kept: list[str] = []
    arguments = Setting("a", TINY, 4), tmp_path, torch.device("cpu"), lambda name, seconds: kept.append(name)
    there, lost = entrants.warmed_up(names, *arguments)
    assert list(there) == kept == ["ours", "builtin"]
    assert lost == {"transformers": "OutOfMemoryError: CUDA out of memory"}
    fails = "builtin"
    with pytest.raises(torch.OutOfMemoryError):
        entrants.warmed_up(names, *arguments)


def test_a_rival_takes_windows_and_what_follows(tmp_path: Path) -> None:
    entrants.write_dataset(tmp_path, 60)
    setting = Setting("a", TINY, 4)
    rival = entrants.BareLoop("builtin", setting, tmp_path, torch.device("cpu"))
    torch.manual_seed(1)
    inputs, targets = rival.data()
    torch.manual_seed(1)
    starts = torch.randint(len(rival.tokens) - 16, (4,)).tolist()
    for start, row, following in zip(starts, inputs, targets, strict=True):
        assert row.tolist() == rival.tokens[start : start + 16].tolist()
        assert following.tolist() == rival.tokens[start + 1 : start + 17].tolist()


def test_the_page_says_where_precision_differs(tmp_path: Path) -> None:
    """And it does: what enters the head in bf16-mixed."""
    entrants.write_dataset(tmp_path, 60)
    dtypes: dict[str, torch.dtype] = {}
    setting = Setting("a", TINY, 4, "bf16-mixed")
    pytest.importorskip("transformers")
    names: list[entrants.Entrant] = ["ours", "builtin", "transformers"]
    for name in names:
        loop = entrants.BareLoop(name, setting, tmp_path, torch.device("cpu"))
        blocks = {"ours": "layers.1", "builtin": "blocks.1", "transformers": "model.layers.1"}
        block = loop.model.get_submodule(blocks[name])
        block.register_forward_hook(lambda _, __, output, name=name: dtypes.update({name: output.dtype}))
        loop.forward(*loop.data())
    assert dtypes == {"ours": torch.bfloat16, "builtin": torch.float32, "transformers": torch.float32}

    result = json.loads((Path(__file__).parents[1] / "logs" / "benchmarks" / "lm-cpu.json").read_text())
    assert "unlike precision" not in bench.markdown(result)
    result["training"][0]["setting"]["precision"] = "bf16-mixed"
    assert bench.markdown(result).count("unlike precision") == bench.markdown(result).count("builtin* |") == 1


def test_the_page_of_a_gpu_says_whether_the_aims_hold() -> None:
    def entrant(speed: float, ratio: float, mfu: float | None) -> dict[str, Any]:
        return {"tokens_per_second": {"median": speed}, "speed_relative_to_builtin": {"median": ratio}, "mfu": mfu}

    def memory(measured: int) -> dict[str, dict[str, int]]:
        ways = {"float32": 100, "bf16": measured}
        return {name: {"measured_bytes": bytes_, "predicted_bytes": 100} for name, bytes_ in ways.items()}

    base = {"ours": entrant(2.3e6, 1.19, 0.3), "builtin": entrant(1.9e6, 1, 0.3)}
    large = {"ours": entrant(1e5, 1.3, 0.499), "ours, library attention": entrant(1e5, 1.3, 0.5)}
    result = {
        "training": [
            {"name": bench.GPU_BASE.name, "entrants": base},
            {"name": bench.GPU_LARGE.name, "entrants": large},
        ],
        "memory": [{"name": "base", "results": memory(89)}, {"name": "12 x 768", "results": memory(110)}],
    }
    assert bench.aims_page(result)[2:-1] == [
        "| at least 1.2 times builtin, base | ours | 1.19 | missed |",
        "| at least 2.2 million tokens/s, base | ours | 2,300,000 | met |",
        "| at least 50 % MFU, 12 x 768 | ours | 49.9% | missed |",
        "| at least 50 % MFU, 12 x 768 | ours, library attention | 50.0% | met |",
        "| memory within 10 % of the prediction, 12 x 768 | bf16 | 1.10 | met |",
        "| memory within 10 % of the prediction, base | bf16 | 0.89 | missed |",
    ]
    large["ours"]["mfu"] = None
    del large["ours, library attention"]
    result["training"][0]["incomplete"] = result["memory"][0]["incomplete"] = "not done after 9 seconds"
    result["memory"].pop()
    assert bench.aims_page(result) == []


def test_the_report_is_what_its_figures_give() -> None:
    folder = Path(__file__).parents[1] / "logs" / "benchmarks"
    page = bench.markdown(json.loads((folder / "lm-cpu.json").read_text()))
    assert (folder / "REPORT.md").read_text().endswith("\n\n" + page)


@pytest.mark.slow
def test_the_whole_suite_for_a_gpu_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in one process, for the time that starting each would take."""
    monkeypatch.setattr(bench, "call_apart", lambda function, *args, seconds, keep: function(*args, keep))
    paths = {"json_path": tmp_path / "result.json", "markdown_path": tmp_path / "result.md"}
    bench.run(suite="gpu", smoke=True, rivals=False, device="cpu", **paths)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failures"] == result["not_run"] == []
    for kind in bench.MEASURE:
        names = [part.setting.name for part in bench.SUITES["gpu"] if part.kind == kind]
        assert [part["name"] for part in result[kind]] == names
    for training in result["training"]:
        assert training["entrants"].keys() == {"ours", "ours, library attention", "lightning", "builtin"}
        for entrant in training["entrants"].values():
            speed = entrant["tokens_per_second"]
            assert 0 < speed["low"] <= speed["median"] <= speed["high"]
        assert training["entrants"]["builtin"]["speed_relative_to_builtin"] == {"median": 1, "low": 1, "high": 1}
        parts = training["entrants"]["ours"]["parts_seconds"]
        assert parts.keys() == {"data", "forward", "backward", "clip and optimizer"}
    (curves,) = result["curves"]
    assert 0 < curves["largest_difference"] < 0.01 < min(curves["differences_of_seeds"])
    for memory in result["memory"]:
        for way in memory["results"].values():
            assert way["measured_bytes"] == pytest.approx(way["predicted_bytes"], rel=0.15)
    page = (tmp_path / "result.md").read_text()
    assert page == capsys.readouterr().out.removesuffix("\n")
    assert page.count("### Training: ") == 4
    assert "no figure here means anything" in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_suite_runs_compiled_on_a_gpu(tmp_path: Path) -> None:
    bench.run(suite="gpu", smoke=True, json_path=tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(bench.is_done(result, part) for part in bench.SUITES["gpu"]), "none lost, none cut off"
