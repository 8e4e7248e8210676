"""The house rules that a machine can hold: who imports whom, what is from scratch, what never runs foreign code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("lm/*.py"), *ROOT.glob("tokenizer/**/*.py")])
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]

# Files whose job is to run a rival beside ours, or to offer a library kernel as an opt-in.
RIVALS_ALLOWED = {"lm/bench.py", "tokenizer/bench.py", "tokenizer/rivals.py"}
FUSED_ATTENTION = {"lm/functional.py", "lm/layers.py"}

# What a module of the project may import from the project; a module that is not named may import anything below it.
MAY_IMPORT = {
    "tokenizer/files.py": set(),
    "tokenizer/pretokenize.py": {"tokenizer.files", "tokenizer.kernels"},
    "tokenizer/reference.py": {"tokenizer.pretokenize"},
    "tokenizer/train.py": {"tokenizer.files", "tokenizer.kernels", "tokenizer.pretokenize"},
    "tokenizer/bpe.py": {"tokenizer.files", "tokenizer.kernels", "tokenizer.pretokenize"},
    "tokenizer/encode.py": {"tokenizer.bpe", "tokenizer.files", "tokenizer.kernels", "tokenizer.pretokenize"},
    "lm/functional.py": set(),
    "lm/optim.py": set(),
    "lm/layers.py": {"lm.functional"},
    "lm/model.py": {"lm.functional", "lm.layers"},
    "lm/grammar.py": set(),
    "lm/download.py": {"tokenizer.files"},
    "lm/prepare.py": {"lm.download", "lm.grammar", "tokenizer"},
    "lm/data.py": {"lm.prepare"},
    "lm/checkpoint.py": {"lm.model", "tokenizer.files"},
    "lm/accounting.py": {"lm.model"},
    "lm/generate.py": {"lm.checkpoint", "lm.functional", "lm.model", "tokenizer"},
    "lm/module.py": {"lm.accounting", "lm.functional", "lm.model", "lm.optim"},
}
LIGHTNING = {"lm/data.py", "lm/module.py", "lm/control.py", "lm/callbacks.py", "lm/cli.py", "lm/bench.py"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that `path` imports, and whether at import time (not inside a function)."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) not in inner
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                yield f"{node.module}.{name.name}", id(node) not in inner


def dotted_names(path: Path) -> Iterator[tuple[str, int]]:
    """Every attribute chain such as `torch.nn.functional.silu`, with import aliases written out, and its line."""
    tree = ast.parse(path.read_text())
    alias = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            alias |= {
                n.asname or n.name.split(".")[0]: n.name if n.asname else n.name.split(".")[0] for n in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            alias |= {n.asname or n.name: f"{node.module}.{n.name}" for n in node.names}
            for name in node.names:
                yield f"{node.module}.{name.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([alias.get(inner.id, inner.id), *reversed(parts)]), node.lineno


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_point_one_way(path: Path) -> None:
    name = relative(path)
    used = [module for module, _ in imports(path)]
    ours = [module for module in used if module.split(".")[0] in ("lm", "tokenizer")]
    if name.startswith("tokenizer/"):
        assert not [m for m in used if m.split(".")[0] in ("torch", "lightning", "lm")], (
            "tokenizer knows no torch, no lm"
        )
    if name.startswith("lm/") and name not in LIGHTNING:
        assert not [m for m, now in imports(path) if now and m.split(".")[0] in ("lightning", "torchmetrics")]
    allowed = MAY_IMPORT.get(name)
    if allowed is not None:
        strangers = [m for m in ours if not any(m == a or m.startswith(a + ".") for a in allowed)]
        assert not strangers, f"{name} may import {sorted(allowed)}"


ALLOWED_NN = {
    "Parameter",
    "Buffer",
    "Module",
    "ModuleList",
    "ModuleDict",
    "Sequential",
    "ParameterList",
    "ParameterDict",
}


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_from_scratch_rule(path: Path) -> None:
    name = relative(path)
    if name in RIVALS_ALLOWED:
        return
    for dotted, line in dotted_names(path):
        where = f"{name}:{line} uses {dotted}"
        if dotted.startswith("torch.nn.functional."):
            assert dotted.endswith(".scaled_dot_product_attention") and name in FUSED_ATTENTION, where
        elif dotted.startswith("torch.nn."):
            part = dotted.removeprefix("torch.nn.").split(".")
            assert part[0] in CONTAINERS or part[:2] in (["init"], ["init", "trunc_normal_"], ["functional"]), where
        elif dotted.startswith("torch.optim."):
            assert dotted.split(".")[2] in ("Optimizer", "optimizer"), where
        assert dotted.split(".")[0] not in ("tiktoken", "tokenizers", "transformers"), where


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_no_foreign_code_is_run(path: Path) -> None:
    forbidden_calls = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "marshal.loads"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in forbidden_calls, f"{relative(path)}:{node.lineno} calls {called}"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert not (keyword.arg == "shell" and value is True), f"{relative(path)}:{node.lineno} shell=True"
                assert not (keyword.arg == "weights_only" and value is False), f"{relative(path)}:{node.lineno}"
                assert not (keyword.arg == "allow_pickle" and value is True), f"{relative(path)}:{node.lineno}"
            if called == "torch.load":
                assert any(k.arg == "weights_only" for k in node.keywords), f"{relative(path)}:{node.lineno} torch.load"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            assert not text.startswith("http://") or "127.0.0.1" in text or "localhost" in text, f"{path}:{node.lineno}"


def test_no_drawer_for_everything() -> None:
    assert not [p for p in SOURCES if p.stem in ("utils", "common", "helpers", "config", "misc")]
