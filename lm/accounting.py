"""What a model costs before it is built: parameters, FLOPs, memory and time, by arithmetic on its configuration.

No tensor is allocated. The formulas describe this project's own model and training step, and the tests hold them
against it: parameters exactly, FLOPs by torch's counter, peak memory within 10 %. CS336 A1, problems
transformer_accounting and adamw_accounting.

In the formulas B is the batch size, T the context length, V the vocabulary, L the layers, h the heads, d `d_model`, f
`d_ff`. A matrix product (m × k) @ (k × n) costs 2·m·k·n FLOPs; everything else is counted as free.
"""

import dataclasses
import json as json_format
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lm import VOCAB_SIZES, default_config
from lm.gradients import HEADS, LOGITS, QUERIES
from lm.model import Attention, TransformerConfig

Rules = Literal["2025", "2026"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
DeviceType = Literal["cpu", "cuda"]
Dtype = Literal["float32", "tf32", "bfloat16", "float16"]

# Layers, d_model, heads.
_GPT2 = {
    "gpt2-small": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
FIT_KEYS = {"seed_everything", "trainer", "model", "data", "run", "resume"}
FIT_KEYS |= {"matmul_precision", "ckpt_path", "weights_only"}

ADAMW_FLOPS_PER_PARAMETER = 14  # decay 2, first moment 3, second moment 4, update 5 (root, + eps, ÷, · lr, −)


# ---------------------------------------------------------------------------------------------------- configurations


def named_config(name: str, rules: Rules = "2026") -> TransformerConfig:
    """A configuration of the handout: `gpt2-small`, `-medium`, `-large`, `-xl`, `tinystories` or `owt`.

    The GPT-2 sizes have d_ff = 4·d_model in the handout of 2025 and 8/3·d_model rounded to a multiple of 64 in that of
    2026, with three feed-forward matrices in both. The rules make no difference to the other two.

    Raises:
        ValueError: there is no such name.
    """
    if name in _GPT2:
        num_layers, d_model, num_heads = _GPT2[name]
        d_ff = 4 * d_model if rules == "2025" else 64 * round(8 * d_model / 3 / 64)
        return TransformerConfig(50_257, 1024, num_layers, num_heads, d_model, d_ff)
    if name in ("tinystories", "owt"):
        return TransformerConfig(
            VOCAB_SIZES[name], context_length=256, num_layers=4, num_heads=16, d_model=512, d_ff=1344
        )
    raise ValueError(f"{name!r} is no model's name: choose from {', '.join(_GPT2)}, tinystories, owt, or a YAML file")


def config_from_yaml(*paths: Path) -> TransformerConfig:
    """The model that `fit` makes of configuration files, each over the one before, the first over configs/builtin.yaml.

    Vocabulary and context length are those of the data section.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, no mapping, a key that `fit` has not, as in the file of a sweep, a setting that no model
            has, an unknown corpus, or a text without a vocabulary size; names the file.
    """
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for path in (default_config(), *paths):
        settings = read_settings(path)
        if foreign := {str(key).partition(".")[0] for key in settings} - FIT_KEYS:
            raise ValueError(f"{path} is no configuration of `fit`, which has no {', '.join(sorted(foreign))}")
        data |= _section(settings, "data", path)
        model |= _section(_section(settings, "model", path), "transformer", path)
        unknown = model.keys() - {field.name for field in dataclasses.fields(TransformerConfig)}
        if unknown:
            raise ValueError(f"{path}: model.transformer has no {', '.join(sorted(unknown))}")
        if data["corpus"] not in VOCAB_SIZES:
            raise ValueError(f"{path}: data.corpus={data['corpus']!r} must be one of {', '.join(VOCAB_SIZES)}")
    if data.get("directory"):
        data |= json_format.loads((Path(data["directory"]) / "meta.json").read_text())
    elif data.get("vocab_size") is None and data.get("train_text"):
        raise ValueError(f"{path}: the vocabulary of data.train_text goes by its size: give data.vocab_size, too")
    elif data.get("vocab_size") is None:
        data["vocab_size"] = VOCAB_SIZES[data["corpus"]]
    return TransformerConfig(**model | {name: data[name] for name in ("vocab_size", "context_length")})


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, no mapping, or a key that is given twice; names the file and, if there is one, the line.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        document = loader.get_single_node()
        twice = _given_twice(document)
        settings = loader.construct_document(document) if document else {}
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: bytes that are no text, 2026-13-01
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: no valid YAML: {getattr(error, 'problem', None) or error}") from error
    if twice:
        raise ValueError(f"{path}, {twice}")
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path}: a mapping of settings is wanted (`name: value`), not a {type(settings).__name__}")
    return settings or {}


def _given_twice(document: Any) -> str | None:
    """Where a mapping has a key twice, of which YAML's reader would keep the last without a word; None if none has.

    Args:
        document: a node as the file has it, before its merge keys (`<<`) are resolved: what they bring may be replaced.
    """
    waiting, seen = [document] if document else [], set()
    while waiting:
        node = waiting.pop()
        if node.id == "scalar" or id(node) in seen:  # aliases lead to one node many times
            continue
        seen.add(id(node))
        if node.id == "sequence":
            waiting += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines and name != "<<":
                return f"line {line}: {name!r} is given twice (first in line {lines[name]})"
            lines[name] = line
            waiting.append(value)
    return None


def _section(settings: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = settings.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: `{name}` must be a mapping of settings, not {section!r}")
    return section


# -------------------------------------------------------------------------------------------------------- parameters


def parameters(config: TransformerConfig) -> dict[str, int]:
    """The number of parameters of each part, over all layers."""
    d, f, layers = config.d_model, config.d_ff, config.num_layers
    parts = {"token embeddings": config.vocab_size * d}
    parts["attention (q, k, v, output)"] = layers * 4 * d * d
    if config.ffn == "swiglu":
        parts["feed-forward (w1, w2, w3)"] = layers * 3 * d * f
    else:
        parts["feed-forward (w1, w2)"] = layers * 2 * d * f
    if config.norm != "none":
        parts["norms"] = (2 * layers + 1) * d
    if config.head == "untied":
        parts["output head"] = config.vocab_size * d
    if config.qk_norm:
        parts["norms of queries and keys"] = layers * 2 * config.d_head
    if config.gated_attention:
        parts["gates of the heads"] = layers * config.num_heads * d
    if config.value_embeddings:
        parts["value embeddings"] = len(config.layers_with_value_embeddings) * config.vocab_size * d
    return parts


def num_parameters(config: TransformerConfig) -> int:
    """All parameters of the model; a tied head counts once."""
    return sum(parameters(config).values())


# ------------------------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class MatrixProduct:
    """`count` products (rows × inner) @ (inner × columns) of one forward pass."""

    name: str
    shapes: str
    rows: int
    inner: int
    columns: int
    count: int

    @property
    def flops(self) -> int:
        """2 · rows · inner · columns, over all `count`."""
        return 2 * self.rows * self.inner * self.columns * self.count


def matrix_products(config: TransformerConfig, batch_size: int = 1) -> list[MatrixProduct]:
    """The matrix products of one forward pass, in the order they happen.

    Attention is counted in full, as is usual for the MFU, though half of the scores are masked and some not computed.
    """
    t, d, f, layers = config.context_length, config.d_model, config.d_ff, config.num_layers
    tokens, heads = batch_size * t, batch_size * config.num_heads
    products = [
        MatrixProduct("query, key, value", "(BT × d) @ (d × 3d)", tokens, d, 3 * d, layers),
        MatrixProduct("attention scores", "(T × d/h) @ (d/h × T)", t, d // config.num_heads, t, layers * heads),
        MatrixProduct("attention-weighted values", "(T × T) @ (T × d/h)", t, t, d // config.num_heads, layers * heads),
        MatrixProduct("attention output", "(BT × d) @ (d × d)", tokens, d, d, layers),
        MatrixProduct("feed-forward w1", "(BT × d) @ (d × f)", tokens, d, f, layers),
        MatrixProduct("feed-forward w2", "(BT × f) @ (f × d)", tokens, f, d, layers),
        MatrixProduct("output head", "(BT × d) @ (d × V)", tokens, d, config.vocab_size, 1),
    ]
    if config.ffn == "swiglu":
        products.insert(5, MatrixProduct("feed-forward w3", "(BT × d) @ (d × f)", tokens, d, f, layers))
    if config.gated_attention:
        products.insert(
            3, MatrixProduct("gates of the heads", "(BT × d) @ (d × h)", tokens, d, config.num_heads, layers)
        )
    return products


def forward_flops(config: TransformerConfig, batch_size: int = 1) -> int:
    """FLOPs of the matrix products of one forward pass."""
    return sum(product.flops for product in matrix_products(config, batch_size))


def flops_per_token(config: TransformerConfig) -> float:
    """FLOPs of forward and backward per token of training, the numerator of the MFU.

    The backward pass has two products for each one of the forward pass. What activation checkpointing computes again
    is not counted: it is no progress.
    """
    return 3 * forward_flops(config) / config.context_length


def adamw_flops(config: TransformerConfig) -> int:
    """FLOPs of one AdamW update."""
    return ADAMW_FLOPS_PER_PARAMETER * num_parameters(config)


# ------------------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Memory:
    """A part of a training step's memory: what it is, its number of elements as a formula and a number, their size."""

    name: str
    formula: str
    num_elements: int
    bytes_per_element: int

    @property
    def num_bytes(self) -> int:
        """Elements times size."""
        return self.num_elements * self.bytes_per_element


def kept_by_block(
    config: TransformerConfig,
    batch_size: int = 1,
    precision: Precision = "32-true",
    device_type: DeviceType = "cpu",
) -> list[Memory]:
    """What one block's forward pass keeps for its backward pass, run eagerly.

    A compiled step keeps less: the compiler computes cheap things twice.
    """
    t, d, f, heads = config.context_length, config.d_model, config.d_ff, config.num_heads
    tokens = batch_size * t
    _, narrow = _bytes(precision)
    normed = 0 if config.norm == "none" else 2
    parts = [
        Memory("residual stream", "2·BTd", 2 * tokens * d, narrow),
        Memory("inputs of the products", f"{normed}·BTd", normed * tokens * d, narrow),
        Memory("queries, keys, values", "3·BTd", 3 * tokens * d, narrow),
    ]
    if in_blocks(config, precision, device_type):
        mixed = 4 if config.attention == "fused" else 2
        parts.append(Memory("mixed values", f"{mixed}·BTd", mixed * tokens * d, narrow))
        parts.append(Memory("log sum exp of the scores", "BhT", batch_size * heads * t, 4))
    else:
        scores = batch_size * heads * t * t
        parts.append(Memory("mixed values", "BTd", tokens * d, narrow))
        parts.append(Memory("attention scores as exponentials", "BhT²", scores, 4))
        parts.append(Memory("attention weights", "BhT²", scores, narrow))
    if config.qk_norm:
        parts.append(Memory("queries and keys before their norms", "2·BTd", 2 * tokens * d, narrow))
    if config.gated_attention:
        parts.append(Memory("gated values", "BTd", tokens * d, narrow))
    inner = 2 if config.ffn == "relu2" else 3
    parts.append(Memory("feed-forward", f"{inner}·BTf", inner * tokens * f, narrow))
    if precision == "bf16-mixed":
        parts.append(Memory("weights in bfloat16", "block", _block_parameters(config), 2))
    else:
        parts.append(Memory("joined query, key, value weights", "3·d²", 3 * d * d, narrow))
    return parts


def activations(
    config: TransformerConfig,
    batch_size: int = 1,
    precision: Precision = "32-true",
    device_type: DeviceType = "cpu",
) -> list[Memory]:
    """What a forward pass keeps for the backward pass: the blocks' parts, and those at the head.

    With activation checkpointing, the inputs of all blocks and the inside of the one that is being computed again. The
    loss keeps no logits but the gradient of its input (`lm.functional.linear_cross_entropy`).
    """
    tokens, d, layers = batch_size * config.context_length, config.d_model, config.num_layers
    _, narrow = _bytes(precision)
    parts = []
    if config.activation_checkpointing:
        parts.append(Memory("inputs of the blocks", "L·BTd", layers * tokens * d, narrow))
        layers = 1
    for part in kept_by_block(config, batch_size, precision, device_type):
        formula = part.formula if config.activation_checkpointing else f"L·{part.formula}"
        parts.append(dataclasses.replace(part, formula=formula, num_elements=layers * part.num_elements))
    parts.append(Memory("last residual stream and its gradient", "2·BTd", 2 * tokens * d, narrow))
    return parts


def training_memory(
    config: TransformerConfig,
    batch_size: int = 1,
    precision: Precision = "32-true",
    device_type: DeviceType = "cpu",
) -> list[Memory]:
    """Parameters, gradients, optimizer state and activations of a training step on one device.

    The peak is less than their sum: activations are freed while gradients come (`training_memory_bytes`).
    """
    size, n = _bytes(precision)[0], num_parameters(config)
    return [
        Memory("parameters", "P", n, size),
        Memory("gradients", "P", n, size),
        Memory("AdamW's two moments", "2·P", 2 * n, size),
        *activations(config, batch_size, precision, device_type),
    ]


def training_memory_bytes(
    config: TransformerConfig,
    batch_size: int = 1,
    precision: Precision = "32-true",
    device_type: DeviceType = "cpu",
) -> int:
    """Peak memory of a training step on one device, in bytes: the greatest of four moments.

    The loss, with its logits; the backward pass through the top block; that through the bottom block, when most
    gradients are there; the update, with all of them. Run eagerly; a compiled step needs less.
    """
    t, d, f = config.context_length, config.d_model, config.d_ff
    tokens = batch_size * t
    wide, narrow = _bytes(precision)
    stream, head, everything = tokens * d * narrow, config.vocab_size * d * wide, num_parameters(config) * wide
    block_gradients = _block_parameters(config) * wide
    kept = [part.num_bytes for part in activations(config, batch_size, precision, device_type)]
    block = sum(part.num_bytes for part in kept_by_block(config, batch_size, precision, device_type))

    rows = min(tokens, max(1, LOGITS // config.vocab_size))
    logits = rows * config.vocab_size * (4 if precision == "32-true" else 6)
    not_yet = block if config.activation_checkpointing else 0
    loss = sum(kept) - not_yet + stream + logits + head * (1 if rows == tokens else 2)

    feed_forward = 3 * tokens * f * narrow + stream + d * f * wide
    if in_blocks(config, precision, device_type):
        rows_at_once = min(batch_size * config.num_heads, HEADS) * min(t, QUERIES)
        attention = 2 * rows_at_once * t * 4 + 3 * stream
    else:
        attention = 16 * batch_size * config.num_heads * t * t  # four tensors of scores in float32
    attention += block_gradients - 3 * tokens * f * narrow
    inside = max(feed_forward, attention)
    top = sum(kept) + head + inside
    above = (config.num_layers - 1) * block_gradients
    bottom = 2 * stream + block + head + above + inside

    copies = 2 if device_type == "cuda" else 1  # on a GPU the update also needs a place for the roots of v
    update = copies * everything + (head if config.head == "tied" else 0)
    return 3 * everything + max(loss, top, bottom, update)


def in_blocks(config: TransformerConfig, precision: Precision, device_type: DeviceType) -> bool:
    """Whether attention never holds all its scores at once."""
    return config.attention == "fused" or (device_type == "cpu" and precision == "32-true")


def _bytes(precision: Precision) -> tuple[int, int]:
    """Bytes of a number in the parameters, and of one that is computed from them."""
    return (2 if precision == "bf16-true" else 4), (4 if precision == "32-true" else 2)


def _block_parameters(config: TransformerConfig) -> int:
    matrices = 3 if config.ffn == "swiglu" else 2
    return 4 * config.d_model**2 + matrices * config.d_model * config.d_ff


def largest_batch(
    config: TransformerConfig,
    memory_bytes: float | int,
    precision: Precision = "32-true",
    device_type: DeviceType = "cpu",
) -> int:
    """The most sequences per step that fit in `memory_bytes`; 0 when not even one does."""
    largest = 0
    bit = 1 << 40
    while bit:
        if training_memory_bytes(config, largest + bit, precision, device_type) <= memory_bytes:
            largest += bit
        bit >>= 1
    return largest


# ----------------------------------------------------------------------------------------------------------- devices

# Dense peak of one device in TFLOP/s: float32 without tensor cores, TF32, bfloat16 with float32 sums, float16 likewise.
# From NVIDIA's and AMD's data sheets and architecture white papers; where a sheet prints the figure "with sparsity",
# half of it. 0: the chip has no such unit. A device is the first row all of whose words are in its name.
_PEAK_TFLOPS: list[tuple[str, float, float, float, float]] = [
    ("GB200", 80, 1250, 2500, 2500),
    ("B200", 75, 1100, 2250, 2250),
    ("GH200", 66.9, 494.7, 989.4, 989.4),
    ("H200 NVL", 60, 417.5, 835.5, 835.5),
    ("H200", 66.9, 494.7, 989.4, 989.4),
    ("H100 NVL", 60, 417.5, 835.5, 835.5),
    ("H100 PCIe", 51.2, 378, 756, 756),
    ("H100", 66.9, 494.7, 989.4, 989.4),
    ("A100", 19.5, 156, 312, 312),
    ("A40", 37.4, 74.8, 149.7, 149.7),
    ("A10G", 31.5, 35, 70, 70),
    ("A10", 31.2, 62.5, 125, 125),
    ("L40S", 91.6, 183, 362, 362),
    ("L40", 90.5, 90.5, 181, 181),
    ("L4", 30.3, 60, 121, 121),
    ("6000 Ada", 91.1, 182.1, 364.2, 364.2),
    ("A6000", 38.7, 77.4, 154.8, 154.8),
    ("5090", 104.8, 104.8, 209.5, 209.5),
    ("4090", 82.6, 82.6, 165.2, 165.2),
    ("3090 Ti", 40, 40, 80, 80),
    ("3090", 35.6, 35.6, 71, 71),
    ("V100", 15.7, 0, 0, 125),
    ("T4", 8.1, 0, 0, 65),
    ("MI300X", 163.4, 653.7, 1307.4, 1307.4),
]


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def peak_flops(device_name: str, dtype: Dtype = "bfloat16") -> float | None:
    """Dense peak of a device in FLOP/s, or None where it is not known: a wrong MFU is worse than none.

    >>> peak_flops("NVIDIA H200", "bfloat16")
    989400000000000.0
    >>> peak_flops("NVIDIA H100 PCIe", "tf32")
    378000000000000.0
    >>> peak_flops("Intel(R) Xeon(R) Processor") is None
    True

    Args:
        device_name: as `torch.cuda.get_device_name()` says it.
        dtype: what the matrix products are computed in; "tf32" is float32 under `set_float32_matmul_precision("high")`.
    """
    words = _words(device_name)
    # Slower parts under the name of the full one (Max-Q; the 4090 D), and AMD's A10 with Radeon graphics.
    if words & {"laptop", "mig", "max", "d", "radeon"}:
        return None
    column = {"float32": 1, "tf32": 2, "bfloat16": 3, "float16": 4}[dtype]
    row = next((row for row in _PEAK_TFLOPS if _words(row[0]) <= words), None)
    return float(row[column]) * 1e12 or None if row else None


def matmul_dtype(precision: str) -> Dtype:
    """What the matrix products are computed in, in this process, at a precision of the Trainer's.

    >>> matmul_dtype("bf16-mixed"), matmul_dtype("16-true")
    ('bfloat16', 'float16')
    """
    if precision.startswith("bf16"):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def device_type_of(device_name: str) -> DeviceType:
    """Whether a name is a processor's or a GPU's, which keep different activations.

    >>> device_type_of("AMD EPYC 9B14"), device_type_of("cpu"), device_type_of("RTX 2080 Ti")
    ('cpu', 'cpu', 'cuda')
    """
    processors = {"cpu", "processor", "intel", "xeon", "epyc", "ryzen", "apple"}
    return "cpu" if _words(device_name) & processors else "cuda"


def training_seconds(config: TransformerConfig, num_tokens: float | int, peak: float, mfu: float | int = 0.5) -> float:
    """Seconds that training on `num_tokens` takes at the share `mfu` of `peak` FLOP/s.

    Raises:
        ValueError: `mfu` is not in (0, 1].
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must be in (0, 1]: it is the share of the device's peak")
    return num_tokens * flops_per_token(config) / (mfu * peak)


# --------------------------------------------------------------------------------------------------------- the page


def account(
    config: TransformerConfig,
    batch_size: int,
    precision: Precision,
    device: str,
    dtype: Dtype,
    memory_gb: float | int,
    mfu: float | int,
    num_tokens: float | int,
) -> dict[str, Any]:
    """All figures of one model, as plain values; arguments as of `run`.

    Raises:
        ValueError: a number that must be positive is not.
    """
    for name, value in (("batch_size", batch_size), ("memory_gb", memory_gb), ("num_tokens", num_tokens)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    forward = forward_flops(config, batch_size)
    peak = peak_flops(device, dtype)
    device_type = device_type_of(device)
    seconds = training_seconds(config, num_tokens, peak, mfu) if peak else None
    large = 1 << 20  # far beyond the batches that are so small that the update takes the most memory
    memory, smallest, at_large, one_more = (
        training_memory_bytes(config, size, precision, device_type) for size in (batch_size, 1, large, large + 1)
    )
    return {
        "config": asdict(config),
        "batch_size": batch_size,
        "precision": precision,
        "parameters": parameters(config),
        "num_parameters": num_parameters(config),
        "matrix_products": [
            {**asdict(product), "flops": product.flops, "share": product.flops / forward}
            for product in matrix_products(config, batch_size)
        ],
        "forward_flops": forward,
        "forward_backward_flops": 3 * forward,
        "flops_per_token": flops_per_token(config),
        "adamw_flops": adamw_flops(config),
        "memory": [
            {**asdict(part), "num_bytes": part.num_bytes}
            for part in training_memory(config, batch_size, precision, device_type)
        ],
        "memory_bytes": memory,
        "memory_bytes_per_sequence": one_more - at_large,
        "memory_bytes_fixed": at_large - large * (one_more - at_large),
        "memory_bytes_at_least": smallest,
        "memory_gb": memory_gb,
        "largest_batch": largest_batch(config, memory_gb * 1e9, precision, device_type),
        "device": device,
        "device_type": device_type,
        "dtype": dtype,
        "peak_flops": peak,
        "mfu": mfu,
        "num_tokens": num_tokens,
        "days": None if seconds is None else seconds / 86_400,
    }


def run(
    model: str = "gpt2-xl",
    rules: Rules = "2026",
    context_length: int | None = None,
    batch_size: int = 1,
    precision: Precision = "32-true",
    activation_checkpointing: bool = False,
    attention: Attention | None = None,
    memory_gb: float = 80,
    device: str = "H100",
    dtype: Dtype | None = None,
    mfu: float = 0.5,
    num_tokens: float | None = None,
    json: bool = False,
) -> None:
    """Parameters, FLOPs, memory and training time of a model, without building it.

    Args:
        model: gpt2-small, gpt2-medium, gpt2-large, gpt2-xl, tinystories, owt, or YAML files as for `fit`, with commas
            between them; gpt2 compares all four sizes.
        rules: the handout's GPT-2 sizes of 2025 (d_ff = 4 d_model) or 2026 (8/3 d_model).
        context_length: instead of the model's own.
        batch_size: sequences per step, for FLOPs and memory.
        precision: how it is trained.
        activation_checkpointing: keep only the blocks' inputs for the backward pass.
        attention: instead of the model's own; "fused" never holds all its scores.
        memory_gb: the device's memory, 10^9 bytes, for the largest batch.
        device: for memory and time, for example H100, A100, "RTX 4090", cpu.
        dtype: of the matrix products; default, float32 in 2025 and TF32 in 2026, or bfloat16 by precision.
        mfu: share of the device's peak that is reached.
        num_tokens: of the whole training; default, 400,000 batches of 1024 for GPT-2, 327,680,000 for the others.
        json: figures for a program instead of tables.
    """
    if dtype is None:
        dtype = "bfloat16" if precision != "32-true" else "float32" if rules == "2025" else "tf32"
    names = list(_GPT2) if model == "gpt2" else [model]
    pages = {}
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        config = config_from_yaml(*map(Path, name.split(","))) if is_file else named_config(name, rules)
        config = dataclasses.replace(
            config,
            context_length=config.context_length if context_length is None else context_length,
            activation_checkpointing=activation_checkpointing or config.activation_checkpointing,
            attention=attention or config.attention,
        )
        tokens: float | int = 400_000 * 1024 * config.context_length if name in _GPT2 else 327_680_000
        tokens = tokens if num_tokens is None else num_tokens
        pages[name] = account(config, batch_size, precision, device, dtype, memory_gb, mfu, tokens)
    if json:
        print(json_format.dumps(pages, indent=1))
    elif len(pages) > 1:
        _print_comparison(pages)
    else:
        _print_page(*pages.popitem())


def _print_page(name: str, page: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    config = page["config"]
    console.print(
        f"[bold]{name}[/bold]: {config['num_layers']} layers, d_model {config['d_model']}, d_ff {config['d_ff']}, "
        f"{config['num_heads']} heads, vocabulary {config['vocab_size']:,}, context {config['context_length']:,}"
    )
    total = f"{page['num_parameters']:,}"
    parts = [(part, f"{n:,}", f"{n / page['num_parameters']:.1%}") for part, n in page["parameters"].items()]
    console.print(_table("Parameters", ["part", "number", "share"], [*parts, ("total", total, "")]))

    products = [
        (p["name"], p["shapes"], f"{p['count']:,}", f"{p['flops']:.4g}", f"{p['share']:.1%}")
        for p in page["matrix_products"]
    ]
    products.append(("forward", "", "", f"{page['forward_flops']:.4g}", ""))
    title = f"FLOPs of the matrix products, {page['batch_size']} x {config['context_length']:,} tokens"
    console.print(_table(title, ["product", "shapes", "number", "FLOPs", "share"], products))
    console.print(
        f"forward and backward {page['forward_backward_flops']:.4g}, {page['flops_per_token']:.4g} per token; "
        f"one AdamW update {page['adamw_flops']:.4g} ({ADAMW_FLOPS_PER_PARAMETER} per parameter)\n"
    )

    memory = [
        (m["name"], m["formula"], str(m["bytes_per_element"]), f"{m['num_bytes'] / 1e9:,.3f}") for m in page["memory"]
    ]
    memory.append(("peak", "", "", f"{page['memory_bytes'] / 1e9:,.3f}"))
    kind = "a CPU" if page["device_type"] == "cpu" else "a GPU"
    title = f"Memory of a training step on {kind}, {page['precision']}, batch size {page['batch_size']}"
    console.print(_table(title, ["part", "elements", "bytes each", "GB"], memory))
    slope = page["memory_bytes_per_sequence"]
    constant, least = page["memory_bytes_fixed"], page["memory_bytes_at_least"]
    at_least = f", but at least {least / 1e9:,.3f} GB" if least > slope + constant else ""
    console.print(
        f"peak = {slope / 1e9:,.3f} GB · batch size + {constant / 1e9:,.3f} GB{at_least}; "
        f"largest batch in {page['memory_gb']:g} GB: {page['largest_batch']:,} sequences\n"
    )

    if page["days"] is None:
        console.print(f"time: the peak of {page['device']} in {page['dtype']} is not known")
    else:
        console.print(
            f"time: {page['num_tokens']:.4g} tokens on one {page['device']} at {page['mfu']:.0%} of "
            f"{page['peak_flops'] / 1e12:,.1f} TFLOP/s ({page['dtype']}): {page['days']:,.2f} days, "
            f"{page['days'] * 1440:,.1f} minutes"
        )


def _print_comparison(pages: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console

    rows = [("parameters", *(f"{page['num_parameters']:,}" for page in pages.values()))]
    rows.append(("forward FLOPs", *(f"{page['forward_flops']:.4g}" for page in pages.values())))
    products = [page["matrix_products"] for page in pages.values()]
    rows += [(same[0]["name"], *(f"{p['share']:.1%}" for p in same)) for same in zip(*products, strict=True)]
    rows.append(("days", *(f"{page['days']:,.1f}" if page["days"] else "-" for page in pages.values())))
    Console(highlight=False).print(_table("Share of the FLOPs", ["", *pages], rows))


def _table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        numeric = i > 0 and column not in ("shapes", "elements")
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*row)
    return table
