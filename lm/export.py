"""Models that leave home, and come: Hugging Face's Llama both ways, GGUF for llama.cpp and its kin.

The default model is a Llama: only the order of the rows of the query and key weights differs. RoPE here rotates
neighbours (2j, 2j+1), in Hugging Face's Llama the halves (j, j + d/2); GGUF keeps neighbours. Wrong there, a model is
still right at position 0, and wrong everywhere else. What a Llama cannot express is refused.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from lm.checkpoint import newest_config
from lm.generate import END_OF_TEXT, end_of_text_id, load
from lm.model import SAME_WEIGHTS, TransformerConfig, TransformerLM
from tokenizer import Tokenizer
from tokenizer.files import atomic_write, spell_vocab, to_symbols, write_json

RMS_NORM_EPS = 1e-5

# Our name and Hugging Face's, GGUF's, of the weights outside and inside a block.
_OUTSIDE = {
    "token_embeddings.weight": ("model.embed_tokens.weight", "token_embd.weight"),
    "ln_final.weight": ("model.norm.weight", "output_norm.weight"),
    "lm_head.weight": ("lm_head.weight", "output.weight"),
}
_INSIDE = {
    "attn.q_proj.weight": ("self_attn.q_proj.weight", "attn_q.weight"),
    "attn.k_proj.weight": ("self_attn.k_proj.weight", "attn_k.weight"),
    "attn.v_proj.weight": ("self_attn.v_proj.weight", "attn_v.weight"),
    "attn.output_proj.weight": ("self_attn.o_proj.weight", "attn_output.weight"),
    "ffn.w1.weight": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "ffn.w2.weight": ("mlp.down_proj.weight", "ffn_down.weight"),
    "ffn.w3.weight": ("mlp.up_proj.weight", "ffn_up.weight"),
    "ln1.weight": ("input_layernorm.weight", "attn_norm.weight"),
    "ln2.weight": ("post_attention_layernorm.weight", "ffn_norm.weight"),
}


def weight_names(config: TransformerConfig) -> dict[str, tuple[str, str]]:
    """{our name: (Hugging Face's, GGUF's)} for every weight of the model."""
    names = {own: others for own, others in _OUTSIDE.items() if own != "lm_head.weight" or config.head == "untied"}
    for i in range(config.num_layers):
        for own, (theirs, gguf) in _INSIDE.items():
            names[f"layers.{i}.{own}"] = (f"model.layers.{i}.{theirs}", f"blk.{i}.{gguf}")
    return names


# What a Llama is where this project has a choice, and what it may be at will. Every other setting, one that is still to
# come as well, has to have its default, which leaves the model as it is.
LLAMA = {"norm": "pre", "position": "rope", "ffn": "swiglu"}
FREE = {"vocab_size", "context_length", "num_layers", "num_heads", "d_model", "d_ff", "rope_theta", "head"}


def require_llama(config: TransformerConfig) -> None:
    """Raise `ValueError`, naming the settings, for a model that Llama's architecture cannot express."""
    wanted = {
        field.name: LLAMA.get(field.name, field.default)
        for field in fields(config)
        if field.name not in FREE | SAME_WEIGHTS
    }
    differing = {name: value for name, value in wanted.items() if getattr(config, name) != value}
    if differing:
        raise ValueError(
            f"{', '.join(f'{name}={getattr(config, name)}' for name in differing)} cannot be expressed by Llama's "
            f"architecture, which has {', '.join(f'{name}={value}' for name, value in differing.items())}"
        )


def neighbours_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head: 0, 2, 4, ..., 1, 3, 5, ... (ours to Hugging Face's)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def halves_to_neighbours(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `neighbours_to_halves`."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _is_rotated(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight"))


# ---------------------------------------------------------------------------------------------------- Hugging Face


def export_hf(model: TransformerLM, tokenizer: Tokenizer, directory: Path, info: Mapping[str, Any] = {}) -> None:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` load: equal logits, equal ids.

    Each file appears whole; the weights come last.

    Args:
        model: of Llama's architecture.
        tokenizer: goes along.
        directory: made where it is missing.
        info: what `lm.checkpoint.load_model` says of the checkpoint, and "training", settings, for the model card.

    Raises:
        ValueError: the model is no Llama.
    """
    from safetensors.torch import save

    config = model.config
    require_llama(config)
    state = model.state_dict()
    weights = {}
    for own, (theirs, _) in weight_names(config).items():
        weight = neighbours_to_halves(state[own], config.num_heads) if _is_rotated(own) else state[own]
        weights[theirs] = weight.detach().cpu().contiguous()
    dtype = str(model.token_embeddings.weight.dtype).removeprefix("torch.")

    end = end_of_text_id(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    write_json(directory / "config.json", hf_config(config, end, dtype))
    write_json(directory / "generation_config.json", hf_generation_config(end))
    write_json(directory / "tokenizer_config.json", hf_tokenizer_config(tokenizer, config, end))
    with atomic_write(directory / "README.md", "w") as file:
        file.write(model_card(model, info))
    with atomic_write(directory / "model.safetensors") as file:
        file.write(save(weights, metadata={"format": "pt"}))


def hf_config(config: TransformerConfig, end: int | None, dtype: str) -> dict[str, Any]:
    """`config.json`, with what transformers 4 and 5 each read; its defaults for the rest would be others than ours."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "initializer_range": 0.02,
        "rms_norm_eps": RMS_NORM_EPS,
        "use_cache": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": config.head == "tied",
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": dtype,
    }


def hf_generation_config(end: int | None) -> dict[str, Any]:
    """`generation_config.json`, with the defaults of `python -m lm generate`: without `top_k`, 50 would be taken."""
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
    return {"bos_token_id": end, "eos_token_id": end, **sampling}


def hf_tokenizer_config(tokenizer: Tokenizer, config: TransformerConfig, end: int | None) -> dict[str, Any]:
    """`tokenizer_config.json`. Without the class, transformers 5 would build another kind of tokenizer for a Llama."""
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    spelling = END_OF_TEXT if end is not None else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelling,
        "eos_token": spelling,
        "unk_token": spelling,
        "pad_token": spelling,
        "additional_special_tokens": [token for token in tokenizer.special_tokens if token != spelling],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
        "added_tokens_decoder": {
            str(tokenizer.encode(token)[0]): {"content": token, **special} for token in tokenizer.special_tokens
        },
    }


def model_card(model: TransformerLM, info: Mapping[str, Any]) -> str:
    """`README.md`: what the model is, what it was trained on, what it reached."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [llama, from-scratch]", "---"]
    num_parameters = sum(p.numel() for p in model.parameters())
    lines += ["", "# A small language model", "", f"{num_parameters:,} parameters, Llama architecture.", ""]
    if info.get("step") is not None:
        lines.append(f"Trained for {info['step']:,} steps.")
    lines += [f"{name}: {value:.4f}" for name, value in sorted(dict(info.get("metrics") or {}).items())]
    sections = {
        "Configuration": asdict(model.config),
        "Training": dict(info.get("training") or {}),
        "Data": dict(info.get("data") or {}),
    }
    for title, facts in sections.items():
        if facts:
            lines += ["", f"## {title}", "", "```json", json.dumps(facts, indent=1, default=str), "```"]
    lines += ["", "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained(".")', 'tokenizer = AutoTokenizer.from_pretrained(".")']
    return "\n".join([*lines, "```", ""])


def import_hf(directory: Path) -> TransformerLM:
    """The model in a directory of Hugging Face's: a Llama with the settings that ours has.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another architecture, a setting that our model lacks, weights that do not fit, or a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {directory}: name a directory with a Hugging Face model")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object, as the config.json of a model is")
    config = config_from_hf(found, path)
    weights: dict[str, Tensor] = {}
    shards = sorted(directory.glob("model*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no model.safetensors in {directory}: only safetensors are read, never pickles")
    for shard in shards:
        try:
            weights |= load_file(shard)
        except SafetensorError as error:
            raise ValueError(f"{shard} is damaged, download it again: {error}") from None
    names = {own: theirs for own, (theirs, _) in weight_names(config).items()}
    missing = sorted(set(names.values()) - weights.keys())
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} weights, the first {missing[0]}")
    state = {own: weights[theirs].float() for own, theirs in names.items()}
    model = TransformerLM(config)
    wrong = [own for own, weight in model.state_dict().items() if weight.shape != state[own].shape]
    if wrong:
        raise ValueError(f"{directory}: {names[wrong[0]]} has shape {tuple(state[wrong[0]].shape)}, not what it says")
    for own in filter(_is_rotated, state):
        state[own] = halves_to_neighbours(state[own], config.num_heads)
    model.load_state_dict(state)
    return model.eval()


# Our name and Hugging Face's of the sizes that a configuration has to give.
_SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
}


def config_from_hf(found: Mapping[str, Any], path: Path) -> TransformerConfig:
    """Our configuration of a Llama's `config.json`, where null is as good as nothing: the default.

    Raises:
        ValueError: it has what ours has not, or lacks what a model needs; names it.
    """
    found = {name: value for name, value in found.items() if value is not None}
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: {rope!r} are no settings of RoPE")
    heads = found.get("num_attention_heads")
    required = {
        "model_type": (found.get("model_type"), "llama"),
        "hidden_act": (found.get("hidden_act", "silu"), "silu"),
        "rms_norm_eps": (found.get("rms_norm_eps", 1e-6), RMS_NORM_EPS),
        "num_key_value_heads": (found.get("num_key_value_heads", heads), heads),
        "attention_bias": (found.get("attention_bias", False), False),
        "mlp_bias": (found.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (value, wanted) in required.items():
        if value != wanted:
            raise ValueError(f"{path}: {name}={value!r}, this project's models have {wanted!r}")
    for name in _SIZES.values():
        if type(found.get(name)) is not int:
            raise ValueError(f"{path}: {name}={found[name]!r} is no size" if name in found else f"{path} lacks {name}")
    rope_theta = rope.get("rope_theta", found.get("rope_theta", 10_000.0))
    try:
        config = TransformerConfig(
            **{own: found[theirs] for own, theirs in _SIZES.items()},
            rope_theta=float(rope_theta),
            head="tied" if found.get("tie_word_embeddings") else "untied",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if found.get("head_dim", config.d_head) != config.d_head:
        raise ValueError(f"{path}: head_dim={found['head_dim']}, here it is always hidden_size / heads={config.d_head}")
    return config


# -------------------------------------------------------------------------------------------------------------- GGUF


def export_gguf(model: TransformerLM, tokenizer: Tokenizer, path: Path, name: str = "model") -> None:
    """Write one GGUF file: weights in float32, as they are, and the tokenizer with GPT-2's pre-tokenizer.

    Raises:
        ValueError: the model is no Llama.
    """
    import gguf

    config = model.config
    require_llama(config)
    spellings = [f"<unused {i}>" for i in range(config.vocab_size)]  # ids that the tokenizer has not
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for spelling, token_id in spell_vocab(tokenizer.vocab, tokenizer.special_tokens).items():
        spellings[token_id] = spelling
        types[token_id] = gguf.TokenType.CONTROL if spelling in tokenizer.special_tokens else gguf.TokenType.NORMAL

    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, "llama")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.d_model)
        writer.add_block_count(config.num_layers)
        writer.add_feed_forward_length(config.d_ff)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.num_heads)
        writer.add_layer_norm_rms_eps(RMS_NORM_EPS)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.d_head)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(spellings)
        writer.add_token_types(types)
        writer.add_token_merges([f"{to_symbols(left)} {to_symbols(right)}" for left, right in tokenizer.merges])
        end = end_of_text_id(tokenizer)
        if end is not None:
            writer.add_bos_token_id(end)
            writer.add_eos_token_id(end)
        writer.add_add_bos_token(False)
        state = model.state_dict()
        for own, (_, theirs) in weight_names(config).items():
            writer.add_tensor(theirs, state[own].detach().cpu().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# ------------------------------------------------------------------------------------------------------ the commands


def require_packages(name: str) -> None:
    """Raise `ValueError` where an optional package is missing."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"the package {name} is not installed: pip install '.[export]' brings it")


def run(
    format: Literal["hf", "gguf"],
    output: Path | None = None,
    ckpt: Path | None = None,
    tokenizer: Path | None = None,
    logs: Path = Path("logs"),
) -> None:
    """Write a trained model for other tools: a Hugging Face directory, or a GGUF file.

    Args:
        format: hf for transformers and its kin, gguf for llama.cpp and its kin.
        output: the directory or file; default, `hf` or `model.gguf` in the run directory.
        ckpt: a checkpoint file or a run directory; default, the newest run. Of a run, the best checkpoint.
        tokenizer: its directory; default, the copy in the run directory.
        logs: where the runs are.
    """
    require_packages("safetensors" if format == "hf" else "gguf")
    model, loaded, info = load(ckpt, logs, tokenizer, "cpu")
    place = Path(info["path"]).parent.parent
    if format == "hf":
        target = output or place / "hf"
        export_hf(model, loaded, target, info | {"training": training_settings(place)})
    else:
        target = output or place / "model.gguf"
        export_gguf(model, loaded, target, name=place.parent.name)
    print(f"{info['path']} (step {info['step']}) is now {target}")


def training_settings(run: Path) -> dict[str, Any]:
    """What a model card tells of a run's configuration: optimizer, schedule, batch, length, the data's name."""
    path = newest_config(run)
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = {
        "model": ("optimizer", "schedule"),
        "data": ("corpus", "batch_size", "context_length"),
        "trainer": ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision"),
        "run": ("name", "max_minutes"),
    }
    found = {
        section: {name: config[section][name] for name in names if name in config[section]}
        for section, names in wanted.items()
        if section in config
    }
    if text := config.get("data", {}).get("train_text"):
        name = Path(text).name  # its folder is nobody's business
        found["data"] |= {"corpus": "own texts" if name in ("", "..") else name}
    if beginning := config.get("model", {}).get("init_from"):
        found["model"]["init_from"] = "/".join(Path(beginning).parts[-4:])
    return found


def run_import(format: Literal["hf"], directory: Path, output: Path = Path("logs/imported/version_0")) -> None:
    """Make a run directory of a model from elsewhere, to generate, to train on, to export.

    Args:
        format: hf, a directory with config.json and model.safetensors of Llama's architecture.
        directory: where it is.
        output: the run directory to make.

    Raises:
        FileExistsError: `output` has a checkpoint already.
    """
    from lm.checkpoint import AtomicCheckpointIO

    require_packages("safetensors")
    path = output / "checkpoints" / "step-000000.ckpt"
    if path.exists():
        raise FileExistsError(f"{path} is there already: choose another --output")
    model = import_hf(directory)
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.save(output / "tokenizer")
    transformer = asdict(model.config)
    contents = {
        "state_dict": {f"model.{name}": weight for name, weight in model.state_dict().items()},
        "transformer": transformer,
        "global_step": 0,
        "TokenDataModule": {"tokenizer_sha256": tokenizer.sha256},  # of its data nothing else is known
        # What Lightning asks a checkpoint for when training goes on from it: here it begins anew.
        "pytorch-lightning_version": importlib.metadata.version("lightning"),
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    AtomicCheckpointIO().save_checkpoint(contents, path)
    settings = {"model": {"transformer": transformer}, "data": {"context_length": transformer.pop("context_length")}}
    del transformer["vocab_size"]  # the data's
    with atomic_write(output / "config.yaml", "w") as file:
        yaml.safe_dump(settings, file, sort_keys=False)
    print(
        f"{directory} is now {path}\n"
        "next:\n"
        f"  python -m lm generate --ckpt {output}\n"
        "to train on, with a text of yours:\n"
        f"  python -m lm fit --model.init_from {output} --data.train_text my.txt"
    )
