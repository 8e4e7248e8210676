"""lm.export against transformers and gguf: equal logits, equal ids, equal greedy text; refusals; the way back."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from toy import SETTINGS, make_dataset, rows

from lm.__main__ import main
from lm.checkpoint import AtomicCheckpointIO, load_model
from lm.export import (
    config_from_hf,
    export_gguf,
    export_hf,
    halves_to_neighbours,
    hf_config,
    import_hf,
    neighbours_to_halves,
    require_llama,
    run,
    run_import,
    training_settings,
    weight_names,
)
from lm.generate import Sampling, generate
from lm.model import TransformerConfig, TransformerLM
from tokenizer import Tokenizer

HARD_TEXTS = [
    "Once upon a time, there was a little girl.",
    "  two  spaces\t\ttabs\n\n\nlines \u00a0 \u2003 ",
    "I'll don't we've it's I'M",
    "naïve café 猫が好き مرحبا 🙂👩‍👩‍👧 ½ ² ٣",
    "a<|endoftext|>b <|endoftext|>",
    "\x00\x1f\u0085 x , y .",
    "x" * 300 + "\r\n\r\n \t 1234567 12.5% $€ _a_b_ C++ <|endoftext <|endoftext|><|endoftext|>",
    "".join(map(chr, [*range(0x20, 0x250), *range(0x2000, 0x2070), *range(0x1F600, 0x1F640)])),
]


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    """All bytes, a few merges, one special token."""
    merges = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"\xe7", b"\x8c"), (b" ", b" ")]
    tokens = [b"<|endoftext|>", *(bytes([i]) for i in range(256)), *(left + right for left, right in merges)]
    return Tokenizer(dict(enumerate(tokens)), merges, ["<|endoftext|>"])


def make_model(**changes: object) -> TransformerLM:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=270, context_length=48, num_layers=2, num_heads=4, d_model=32, d_ff=64)
    return TransformerLM(dataclasses.replace(config, **changes)).eval()


def test_reordering_of_rows_and_its_inverse() -> None:
    weight = torch.arange(12.0)[:, None].expand(12, 2)
    assert neighbours_to_halves(weight, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(halves_to_neighbours(neighbours_to_halves(weight, 2), 2), weight)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_transformers_loads_the_same_model(head: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    ours = make_model(head=head, rope_theta=5000.0)
    export_hf(ours, small_tokenizer, tmp_path, {"step": 12, "metrics": {"val/loss": 1.25}, "data": {"seed": 1}})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    token_ids = torch.randint(270, (3, 48))  # at position 0 alone, wrongly ordered rows would not be seen
    with torch.no_grad():
        torch.testing.assert_close(theirs(token_ids).logits, ours(token_ids), rtol=0, atol=1e-5)

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert their_tokenizer.encode(text) == small_tokenizer.encode(text)
        assert their_tokenizer.decode(small_tokenizer.encode(text)) == text

    prompt = torch.tensor([small_tokenizer.encode("the cat")])
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    expected = generate(ours, small_tokenizer, "the cat", Sampling(temperature=0, max_new_tokens=20))[0]
    assert small_tokenizer.decode(text[0, prompt.shape[1] :].tolist()).removesuffix("<|endoftext|>") == expected
    theirs.lm_head.weight.data *= 1e-3  # all tokens about equally probable: no top_k leaves only the first of them
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 1, "pad_token_id": 0}
    drawn = theirs.generate(prompt, num_return_sequences=400, **options)[:, -1]
    assert len(set(drawn.tolist())) > 100
    assert {path.name for path in tmp_path.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = (tmp_path / "README.md").read_text()
    assert all(part in card for part in ("val/loss: 1.2500", "12 steps", '"d_ff": 64', '"seed": 1'))


def test_transformers_pads_and_knows_every_special_token(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    special = ["<|endoftext|>", "<|user|>", "<|a longer one|>"]
    vocab = small_tokenizer.vocab | {len(small_tokenizer.vocab) + i: t.encode() for i, t in enumerate(special[1:])}
    ours = Tokenizer(vocab, small_tokenizer.merges, special)
    export_hf(make_model(), ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert set(theirs.all_special_tokens) == set(special)
    texts = [*HARD_TEXTS, "<|user|>the cat<|a longer one|><|endoftext|>", "a"]
    expected = [ours.encode(text) for text in texts]
    assert [theirs.encode(text) for text in texts] == expected
    padded = theirs(texts, padding=True)
    for token_ids, mask, own in zip(padded["input_ids"], padded["attention_mask"], expected, strict=True):
        assert [token_id for token_id, real in zip(token_ids, mask, strict=True) if real] == own
        assert {token_id for token_id, real in zip(token_ids, mask, strict=True) if not real} <= {0}
    assert len(theirs) == len(vocab)
    assert theirs.decode(expected[-2], skip_special_tokens=True) == "the cat"


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_what_was_exported_comes_back_bit_for_bit(head: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    pytest.importorskip("safetensors")
    ours = make_model(head=head)
    export_hf(ours, small_tokenizer, tmp_path)
    back = import_hf(tmp_path)
    assert back.config == ours.config
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize(
    "change",
    [
        *({"norm": "post"}, {"norm": "none"}, {"position": "none"}, {"ffn": "silu"}, {"ffn": "relu2"}),
        *({"qk_norm": True}, {"gated_attention": True}, {"value_embeddings": True}),
    ],
    ids=str,
)
def test_what_llama_cannot_express_is_refused(change: dict, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value} cannot be expressed"):
        export_hf(make_model(**change), small_tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{name}={value} cannot be expressed"):
        export_gguf(make_model(**change), small_tokenizer, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_setting_that_is_still_to_come_is_refused_unless_it_is_off() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(TransformerConfig):
        twist: bool = False

    require_llama(Later(vocab_size=9))
    with pytest.raises(
        ValueError, match="twist=True cannot be expressed by Llama's architecture, which has twist=False"
    ):
        require_llama(Later(vocab_size=9, twist=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"vocab_size": None}, r"config\.json lacks vocab_size"),
        ({"hidden_size": "wide"}, r"config\.json: hidden_size='wide' is no size"),
        ({"num_attention_heads": 5, "num_key_value_heads": None}, r"config\.json: num_heads=5 must divide"),
        ({"rope_parameters": "default"}, r"config\.json: 'default' are no settings of RoPE"),
        ({"rope_parameters": {"rope_theta": []}}, r"config\.json: .*float"),
    ],
    ids=str,
)
def test_foreign_llamas_are_refused(change: dict, message: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    pytest.importorskip("safetensors")
    export_hf(make_model(), small_tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config_from_hf(config | change, tmp_path / "config.json")


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "rope_scaling", "attention_bias"])
def test_null_in_a_configuration_is_the_default(name: str, tmp_path: Path) -> None:
    config = make_model().config
    assert config_from_hf(hf_config(config, 0, "float32") | {name: None}, tmp_path / "config.json") == config


def test_missing_and_damaged_directories(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        import_hf(tmp_path)
    export_hf(make_model(), small_tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="lacks 9 weights"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    with pytest.raises(ValueError, match="not what it says"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 1, "num_key_value_heads": 1}))
    with pytest.raises(ValueError, match="head_dim=8"):
        import_hf(tmp_path)
    for text in ("[1]", "null", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is no JSON") as error:
            import_hf(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    for size in (len(weights) - 1, len(weights) // 2, 100, 3, 0):
        (tmp_path / "model.safetensors").write_bytes(weights[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged") as error:
            import_hf(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        import_hf(tmp_path)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_gguf_holds_the_same_weights_and_tokens(head: str, tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    gguf = pytest.importorskip("gguf")
    ours = make_model(head=head)
    export_gguf(ours, small_tokenizer, tmp_path / "model.gguf", "small")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    state = ours.state_dict()
    for own, (_, theirs) in weight_names(ours.config).items():
        assert torch.equal(tensors[theirs], state[own]), own
    assert ("output.weight" in tensors) == (head == "untied")
    assert len(tensors) == len(state)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == pytest.approx(10_000)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert fields["tokenizer.ggml.tokens"][257] == "Ġt"
    assert fields["tokenizer.ggml.merges"][:2] == ["Ġ t", "h e"]
    assert len(fields["tokenizer.ggml.tokens"]) == 270


def test_transformers_reads_the_gguf_as_the_same_model(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """Through its converter alone: `from_pretrained(gguf_file=...)` asks for the package accelerate."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours = make_model()
    export_gguf(ours, small_tokenizer, tmp_path / "model.gguf")
    skeleton = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(ours.config, 0, "float32"))).eval()
    found = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=skeleton)
    assert found["config"]["hidden_size"] == 32
    skeleton.load_state_dict(found["tensors"])
    token_ids = torch.randint(270, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(skeleton(token_ids).logits, ours(token_ids), rtol=1e-4, atol=1e-5)


def test_commands_there_and_back(
    tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("gguf")
    ours, here = make_model(), tmp_path / "run" / "version_0"
    contents = {
        "state_dict": {f"model.{name}": weight for name, weight in ours.state_dict().items()},
        "transformer": dataclasses.asdict(ours.config),
        "global_step": 7,
    }
    AtomicCheckpointIO().save_checkpoint(contents, here / "checkpoints" / "step-000007.ckpt")
    small_tokenizer.save(here / "tokenizer")
    run("hf", logs=tmp_path)
    run("gguf", logs=tmp_path)
    assert (here / "model.gguf").is_file()
    capsys.readouterr()
    run_import("hf", here / "hf", tmp_path / "imported")
    words = capsys.readouterr().out.split()
    assert words[words.index("--model.init_from") + 1] == str(tmp_path / "imported"), "the line can be pasted"
    back, info = load_model(tmp_path / "imported")
    assert info["data"] == {"tokenizer_sha256": small_tokenizer.sha256}, "what training on is compared with"
    token_ids = torch.randint(270, (1, 20))
    with torch.no_grad():
        assert torch.equal(back(token_ids), ours(token_ids))
    assert Tokenizer.from_directory(tmp_path / "imported" / "tokenizer").sha256 == small_tokenizer.sha256
    with pytest.raises(FileExistsError, match="choose another --output"):
        run_import("hf", here / "hf", tmp_path / "imported")


@pytest.mark.slow
def test_an_imported_model_trains_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss in the first step is what the exported model's was in its last validation, and falls."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lm"])
    data = ["--data.directory", str(make_dataset(tmp_path / "toy"))]
    assert main(["fit", *data, *SETTINGS, "--trainer.max_steps=60", "--run.validate_every_n_steps=60"]) == 0
    [trained] = [
        row["val/loss"] for row in rows(Path("logs/toy/version_0")) if row.get("step") == 60 and "val/loss" in row
    ]
    assert main(["export", "hf"]) == 0
    card = Path("logs/toy/version_0/hf/README.md").read_text()
    assert all(part in card for part in ('"warmup_steps": 2', '"train_tokens"', f"val/loss: {trained:.4f}"))
    assert main(["import", "hf", "logs/toy/version_0/hf"]) == 0
    for start in (
        ["--model.init_from=logs/imported"],
        ["--ckpt_path=logs/imported/version_0/checkpoints/step-000000.ckpt"],
    ):
        assert main(["fit", *data, *SETTINGS, *start, "--run.name=on", "--trainer.max_steps=4"]) == 0
    for version in (0, 1):
        found = rows(Path(f"logs/on/version_{version}"))
        assert found[0]["step"] == 1
        assert found[0]["train/loss"] == pytest.approx(trained, abs=0.3)
        assert found[-1]["val/loss"] < trained + 0.05


def test_gguf_says_what_ids_the_tokenizer_has_not(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    gguf = pytest.importorskip("gguf")
    export_gguf(make_model(), small_tokenizer, tmp_path / "model.gguf")
    types = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.token_type").contents()
    kinds = gguf.TokenType
    assert types == [kinds.CONTROL] + [kinds.NORMAL] * 261 + [kinds.UNUSED] * 8


def test_a_model_card_names_ones_own_text_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {corpus: builtin, train_text: /home/me/diary.txt}")
    assert training_settings(tmp_path)["data"] == {"corpus": "diary.txt"}
    for folder, name in {"diary/": "diary", ".": "own texts", "../..": "own texts"}.items():
        (tmp_path / "config.yaml").write_text(f"data: {{corpus: builtin, train_text: {folder}}}")
        assert training_settings(tmp_path)["data"] == {"corpus": name}
    (tmp_path / "config-resumed-20300101-000000.yaml").write_text("data: {batch_size: 9}")
    assert training_settings(tmp_path)["data"] == {"batch_size": 9}, "those that the run was last gone on with"
