"""The house rules that a machine can hold: who imports whom, what is from scratch, what never runs foreign code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("lm/*.py"), *ROOT.glob("tokenizer/**/*.py")])
every_source = pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])

# A module may import those that stand before it; tokenizer/ knows nothing of lm/.
ORDER = """
tokenizer.kernels tokenizer.files tokenizer.progress tokenizer.chunks tokenizer.pretokenize tokenizer.reference
tokenizer.train tokenizer.bpe tokenizer.encode tokenizer tokenizer.stats tokenizer.show tokenizer.synthetic
tokenizer.rivals tokenizer.bench tokenizer.options tokenizer.__main__
lm lm.device lm.gradients lm.functional lm.layers lm.model lm.optim lm.accounting lm.grammar lm.download lm.texts
lm.prepare lm.data lm.checkpoint lm.stops lm.generate lm.session lm.serve lm.export lm.module lm.options lm.control
lm.callbacks lm.report lm.bundle lm.ranks lm.parser lm.problems lm.defaults lm.cli lm.apart lm.rivals lm.entrants
lm.measure lm.bench lm.sweep lm.__main__
""".split()

# What should be readable alone is held to less than the order allows.
ONLY = {
    "lm.device": [],
    "lm.gradients": [],
    "lm.functional": ["lm.gradients"],
    "lm.layers": ["lm.functional", "lm.gradients"],
    "lm.model": ["lm.functional", "lm.layers"],
    "lm.optim": [],
    "lm.accounting": ["lm.gradients", "lm.model"],
    "lm.data": ["lm.prepare"],
    "lm.stops": [],
    "lm.apart": [],
    "lm.rivals": ["lm.model"],
    "lm.checkpoint": ["lm.model", "tokenizer.files"],
    "lm.module": ["lm.checkpoint", "lm.functional", "lm.model", "lm.optim"],
}
USE_LIGHTNING = {"lm.data", "lm.module", "lm.control", "lm.callbacks", "lm.ranks", "lm.parser", "lm.cli"}
RUN_RIVALS = {"lm.rivals", "lm.entrants", "tokenizer.rivals"}  # their job is to run other implementations beside ours


def module_name(path: Path) -> str:
    """The dotted name; one for all kernels, which are one step of the order."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[:2] == ("tokenizer", "kernels"):
        return "tokenizer.kernels"
    return ".".join(part for part in parts if part != "__init__")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every imported name, `torch.nn.Module` for `from torch.nn import Module`, and its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{name.name}", node) for name in node.names)


def imported_module(name: str) -> str:
    """The step of the order that an imported name of ours belongs to."""
    return max((step for step in ORDER if name == step or name.startswith(f"{step}.")), key=len)


def library_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every use of a library by its full name, such as `torch.nn.functional.silu`, and its line."""
    alias = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            alias |= {name.asname or name.name.split(".")[0]: name.name.split(".")[0] for name in node.names}
            alias |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            alias |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    for name, node in imports(tree):
        yield name, node.lineno
    for node in ast.walk(tree):
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in alias:
            yield ".".join([alias[inner.id], *parts]), node.lineno


@every_source
def test_imports_point_one_way(path: Path) -> None:
    tree, name = ast.parse(path.read_text()), module_name(path)
    used = {module for module, _ in imports(tree)}
    ours = {imported_module(module) for module in used if module.split(".")[0] in ("lm", "tokenizer")} - {name, "lm"}
    allowed = ONLY.get(name, ORDER[: ORDER.index(name)])
    # bpe and encode are used by the package's __init__, which comes after them.
    assert ours <= {*allowed} or name == "tokenizer", f"{name} may not import {sorted(ours - {*allowed})}"
    libraries = {module.split(".")[0] for module in used}
    if name.startswith("tokenizer"):
        assert not libraries & {"torch", "lightning", "lm"}
    elif name not in USE_LIGHTNING:
        inside = {
            id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)
        }
        at_once = {module.split(".")[0] for module, node in imports(tree) if id(node) not in inside}
        assert not at_once & {"lightning", "torchmetrics"}


@every_source
def test_from_scratch_rule(path: Path) -> None:
    name = module_name(path)
    if name in RUN_RIVALS:
        return
    containers = {"Parameter", "Buffer", "Module", "ModuleList", "ModuleDict", "Sequential", "ParameterList"}
    for used, line in library_names(ast.parse(path.read_text())):
        where = f"{path}:{line} uses {used}"
        parts = used.split(".")
        assert parts[0] not in ("tiktoken", "tokenizers", "transformers"), where
        if parts[:3] == ["torch", "nn", "functional"]:  # the opt-in library kernel
            assert name == "lm.layers" and parts[3:] == ["scaled_dot_product_attention"], where
        elif parts[:2] == ["torch", "nn"] and len(parts) > 2:
            assert parts[2] in containers or parts[2:4] == ["init", "trunc_normal_"], where
        elif parts[:2] == ["torch", "optim"] and len(parts) > 2:
            assert parts[2] == "Optimizer", where


@every_source
def test_no_foreign_code_is_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith("http://") or node.value == "http://", f"{path}:{node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        where, called = f"{path}:{node.lineno}", ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}, where
        assert keywords.get("shell") != "True" and keywords.get("allow_pickle") != "True", where
        assert called != "torch.load" or keywords.get("weights_only") == "True", where


def test_time_is_measured_by_the_clock_that_never_jumps() -> None:
    assert not [path for path in SOURCES if re.search(r"\btime\.time(_ns)?\(", path.read_text())]


def test_versions_with_known_holes_are_excluded() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, needed)}
    assert not any(
        version in allowed["lightning"] for version in ("2.6.2", "2.6.3", "2.6.5")
    )  # malware; a loader's hole
    assert not any(version in allowed["torch"] for version in ("2.5.1", "2.9.1"))  # holes in the weights_only loader


@pytest.mark.slow
def test_a_wheel_is_built_offline_and_has_our_files_alone(tmp_path: Path) -> None:
    """With what `python -m lm fit` needs of configs/, where the checkout is not at hand."""
    pytest.importorskip("setuptools", reason="builds the wheel")
    source = tmp_path / "source"
    for name in ("lm", "tokenizer", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..'); build_meta.build_sdist('..')"
    command = [sys.executable, "-c", build]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path / "site")
    ours = {path.relative_to(ROOT).as_posix() for path in SOURCES} | {"lm/serve.html"}
    configs = {f"lm/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("configs/**/*.yaml")}
    assert set(names) == ours | configs
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    found = "import lm; print(lm.default_config())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    said = subprocess.run(
        [sys.executable, "-P", "-c", found], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert said.strip() == str(tmp_path / "site/lm/configs/builtin.yaml")


def test_the_page_of_faults_names_tests_that_exist() -> None:
    there = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                slow = "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
                there.add((path.stem, node.name + "*" * slow))
    named = {
        (file, test)
        for file, tests in re.findall(
            r"(test_\w+): ((?:test_\w+\*?(?:, )?)+)", (ROOT / "tests" / "FAULTS.md").read_text()
        )
        for test in tests.split(", ")
    }
    assert len(named) > 70
    assert not named - there, "renamed, gone, or marked slow (with *) on one side only"


def test_no_drawer_for_everything() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "common", "helpers", "config", "misc")]
