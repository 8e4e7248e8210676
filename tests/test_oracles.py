"""The whole model against independent implementations: transformers' Llama, and torch.nn's built-ins."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lm.functional import cross_entropy
from lm.model import TransformerConfig, TransformerLM

CONFIG = TransformerConfig(
    vocab_size=50, context_length=32, num_layers=3, num_heads=4, d_model=32, d_ff=64, rope_theta=5000.0
)


def model_and_tokens(config=CONFIG):
    torch.manual_seed(0)
    model = TransformerLM(config)
    for name, parameter in model.named_parameters():
        if "ln" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # gains of 1 would hide a missing one
    return model, torch.randint(config.vocab_size, (2, 25))


def halves_from_neighbours(weight, num_heads):
    """Reorder the rows of a query or key projection from RoPE on pairs (2j, 2j + 1) to pairs (j, j + d_k / 2)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def test_the_model_equals_transformers_llama():
    transformers = pytest.importorskip("transformers")
    ours, tokens = model_and_tokens()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.d_model,
            intermediate_size=CONFIG.d_ff,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            max_position_embeddings=CONFIG.context_length,
            rope_theta=CONFIG.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    names = {
        "token_embeddings": "model.embed_tokens",
        "layers": "model.layers",
        "attn.output_proj": "self_attn.o_proj",
        "attn": "self_attn",
        "ffn.w1": "mlp.gate_proj",
        "ffn.w2": "mlp.down_proj",
        "ffn.w3": "mlp.up_proj",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "ln_final": "model.norm",
    }
    state = {}
    for name, weight in ours.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = halves_from_neighbours(weight, CONFIG.num_heads)
        for old, new in names.items():
            name = name.replace(old, new) if new not in name else name
        state[name] = weight
    theirs.load_state_dict(state)
    expected = theirs(tokens, labels=tokens)
    torch.testing.assert_close(ours(tokens), expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross_entropy(ours(tokens)[:, :-1], tokens[:, 1:]), expected.loss, rtol=1e-5, atol=1e-5)


def builtin_forward(weights, tokens, config=CONFIG):
    """The architecture from torch's built-ins, with RoPE as multiplication of complex numbers."""
    x = F.embedding(tokens, weights["token_embeddings.weight"])
    seq = tokens.shape[-1]
    d_k = config.d_model // config.num_heads
    angles = torch.arange(seq)[:, None] * config.rope_theta ** (-torch.arange(0, d_k, 2) / d_k)

    def rotate(vectors):
        pairs = torch.view_as_complex(vectors.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def norm(vectors, name):
        return F.rms_norm(vectors, (config.d_model,), weights[name], eps=1e-5)

    for layer in range(config.num_layers):
        w = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()}
        h = norm(x, f"layers.{layer}.ln1.weight")
        q, k, v = (
            F.linear(h, w[f"attn.{name}_proj.weight"])
            .unflatten(-1, (config.num_heads, d_k))
            .transpose(1, 2)
            .contiguous()
            for name in "qkv"
        )
        h = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + F.linear(h.transpose(1, 2).flatten(-2), w["attn.output_proj.weight"])
        h = norm(x, f"layers.{layer}.ln2.weight")
        x = x + F.linear(F.silu(F.linear(h, w["ffn.w1.weight"])) * F.linear(h, w["ffn.w3.weight"]), w["ffn.w2.weight"])
    return F.linear(norm(x, "ln_final.weight"), weights["lm_head.weight"])


def test_the_model_and_its_gradients_equal_torchs_builtins():
    model, tokens = model_and_tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = dict(model.named_parameters())
    logits, expected = model(inputs), builtin_forward(weights, inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(cross_entropy(logits, targets), list(weights.values()))
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected_loss, list(weights.values()))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
