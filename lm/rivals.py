"""What one would write without this project, to be measured beside it: torch's own layers, `transformers`' Llama."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.model import TransformerConfig, TransformerLM


class BuiltinBlock(nn.Module):
    """Pre-norm, RoPE, SwiGLU from torch's own layers; one matrix for q, k and v."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.ln1 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.output_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ln2 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention and feed-forward, each with its residual connection."""
        batch, seq, d_model = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(batch, seq, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output_proj(attended.transpose(1, 2).reshape(batch, seq, d_model))
        h = self.ln2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class BuiltinLM(nn.Module):
    """The same architecture as the default `TransformerLM`, as one would write it with `torch.nn`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(BuiltinBlock(config) for _ in range(config.num_layers))
        self.ln_final = nn.RMSNorm(config.d_model, eps=1e-5)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.head == "tied":
            self.lm_head.weight = self.embedding.weight
        frequencies = config.rope_theta ** (-torch.arange(0, config.d_head, 2) / config.d_head)
        angles = torch.arange(config.context_length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(token_ids)
        cos, sin = self.cos[: token_ids.shape[1]], self.sin[: token_ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.ln_final(x))

    @classmethod
    def from_ours(cls, ours: TransformerLM) -> "BuiltinLM":
        """The same function with the same weights."""
        model = cls(ours.config)
        weights = ours.state_dict()
        embedding = weights["token_embeddings.weight"]
        state = {
            "embedding.weight": embedding,
            "ln_final.weight": weights["ln_final.weight"],
            "lm_head.weight": weights.get("lm_head.weight", embedding),
        }
        for i in range(ours.config.num_layers):
            theirs, own = f"blocks.{i}", f"layers.{i}"
            qkv = [weights[f"{own}.attn.{name}_proj.weight"] for name in "qkv"]
            state[f"{theirs}.qkv.weight"] = torch.cat(qkv)
            state[f"{theirs}.output_proj.weight"] = weights[f"{own}.attn.output_proj.weight"]
            for name in ("w1", "w2", "w3"):
                state[f"{theirs}.{name}.weight"] = weights[f"{own}.ffn.{name}.weight"]
            for name in ("ln1", "ln2"):
                state[f"{theirs}.{name}.weight"] = weights[f"{own}.{name}.weight"]
        model.load_state_dict(state)
        return model


def make_llama(config: TransformerConfig) -> nn.Module:
    """`transformers`' Llama of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": config.head == "tied",
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**shape))
