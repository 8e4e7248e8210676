"""What torch.compile makes of the loss and the update: the same numbers, in less memory, without compiling again.

In a process of its own: the compiler cannot look through the shape checks of the test run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json, re, sys
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from lm import functional, optim
from lm.module import compiled

torch.manual_seed(0)
found = {}

# The loss over a vocabulary: which tensors as large as all logits does the compiled code make?
hidden, weight = torch.randn(2, 60, 32, requires_grad=True), torch.randn(1000, 32, requires_grad=True)
targets = torch.randint(1000, (2, 60))

def gradients(loss):
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(hidden, weight, targets)
    return [value, *torch.autograd.grad(value, (hidden, weight))]

ours, code = run_and_get_code(gradients, compiled(functional.linear_cross_entropy, "reduce-overhead"))
found["large"] = re.findall(r"empty_strided\\w*\\(\\((?:120|2, 60), 1000\\), .*(torch.\\w+)\\)", "".join(code))
found["num_graphs"] = len(code)
eager = gradients(functional.linear_cross_entropy)
found["loss"] = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
                 for a, b in zip(ours[1:], eager[1:])] + [abs(ours[0] / eager[0] - 1).item()]

# The update, with another learning rate each time.
counters.clear()
shapes = [(50, 8), (8,)]
start = [torch.randn(shape) for shape in shapes]
copies = []
for update in (optim.adamw_update, optim.fused_adamw_update):
    optim.adamw_update = update
    torch.manual_seed(1)
    params = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    copies.append([*params, *(state["v"] for state in optimizer.state.values())])
found["update"] = max((a - b).abs().max().item() for a, b in zip(*copies))
found["graphs of the update"] = counters["stats"]["unique_graphs"]
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program saw."""
    path = tmp_path_factory.mktemp("compiled") / "found.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], env=environment, check=True)
    return json.loads(path.read_text())


def test_the_loss_makes_no_logits_in_float32(found: dict[str, Any]) -> None:
    assert found["num_graphs"] == 2  # forward and backward
    assert found["large"] == ["torch.bfloat16"]  # the logits, which become their own gradient
    *cosines, difference = found["loss"]
    assert min(cosines) > 0.999
    assert difference < 0.01


def test_the_update_is_the_same_and_compiled_once_whatever_the_rate(found: dict[str, Any]) -> None:
    assert 0 < found["update"] < 1e-6  # not the same code
    assert found["graphs of the update"] == 1
