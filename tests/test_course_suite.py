"""The adapters take and return what the course's suite gives and compares; the numbers have tests of their own."""

import inspect

import adapters
import numpy as np
import torch
from torch.nn import functional as F

from lm.model import TransformerConfig, TransformerLM

# names and parameters of the assignment's tests/adapters.py, in its order
SIGNATURES = {
    "run_linear": "d_in d_out weights in_features",
    "run_embedding": "vocab_size d_model weights token_ids",
    "run_swiglu": "d_model d_ff w1_weight w2_weight w3_weight in_features",
    "run_scaled_dot_product_attention": "Q K V mask",
    "run_multihead_self_attention": (
        "d_model num_heads q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features"
    ),
    "run_multihead_self_attention_with_rope": (
        "d_model num_heads max_seq_len theta q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features "
        "token_positions"
    ),
    "run_rope": "d_k theta max_seq_len in_query_or_key token_positions",
    "run_transformer_block": "d_model num_heads d_ff max_seq_len theta weights in_features",
    "run_transformer_lm": "vocab_size context_length d_model num_layers num_heads d_ff rope_theta weights in_indices",
    "run_rmsnorm": "d_model eps weights in_features",
    "run_silu": "in_features",
    "run_get_batch": "dataset batch_size context_length device",
    "run_softmax": "in_features dim",
    "run_cross_entropy": "inputs targets",
    "run_gradient_clipping": "parameters max_l2_norm",
    "get_adamw_cls": "",
    "run_get_lr_cosine_schedule": "it max_learning_rate min_learning_rate warmup_iters cosine_cycle_iters",
    "run_save_checkpoint": "model optimizer iteration out",
    "run_load_checkpoint": "src model optimizer",
    "get_tokenizer": "vocab merges special_tokens",
    "run_train_bpe": "input_path vocab_size special_tokens kwargs",
}


def test_every_adapter_has_the_courses_parameters():
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(adapters, name)).parameters) == parameters.split(), name


def test_the_layers_take_given_weights():
    torch.manual_seed(0)
    x, square, gains = torch.randn(2, 5, 8), torch.randn(4, 8, 8), torch.randn(8)
    torch.testing.assert_close(adapters.run_linear(8, 8, square[0], x), x @ square[0].T)
    torch.testing.assert_close(
        adapters.run_embedding(8, 8, square[0], torch.arange(6).view(2, 3)), square[0][:6].view(2, 3, 8)
    )
    torch.testing.assert_close(adapters.run_rmsnorm(8, 1e-5, gains, x), F.rms_norm(x, (8,), gains, 1e-5))
    torch.testing.assert_close(
        adapters.run_swiglu(8, 8, *square[:3], x), (F.silu(x @ square[0].T) * (x @ square[2].T)) @ square[1].T
    )
    torch.testing.assert_close(adapters.run_silu(x), F.silu(x))
    torch.testing.assert_close(adapters.run_softmax(x, 1), F.softmax(x, 1))
    targets = torch.tensor([1, 7, 0, 3, 3])
    torch.testing.assert_close(adapters.run_cross_entropy(x[0], targets), F.cross_entropy(x[0], targets))
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    mask = torch.ones(2, 3, 5, 5).tril().bool()
    torch.testing.assert_close(
        adapters.run_scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    )


def test_blocks_and_model_take_the_reference_state_dict():
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=30, context_length=16, num_layers=2, num_heads=2, d_model=8, d_ff=16, rope_theta=100.0
    )
    model = TransformerLM(config)
    weights = model.state_dict()
    token_ids = torch.randint(30, (2, 12))
    torch.testing.assert_close(
        adapters.run_transformer_lm(30, 16, 8, 2, 2, 16, 100.0, weights, token_ids), model(token_ids)
    )
    x = torch.randn(2, 12, 8)
    block = {name.removeprefix("layers.1."): w for name, w in weights.items() if name.startswith("layers.1.")}
    torch.testing.assert_close(adapters.run_transformer_block(8, 2, 16, 16, 100.0, block, x), model.layers[1](x))
    projections = [block[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output")]
    with_rope = adapters.run_multihead_self_attention_with_rope(
        8, 2, 16, 100.0, *projections, x, torch.arange(12)[None]
    )
    torch.testing.assert_close(with_rope, model.layers[1].attn(x))
    without = adapters.run_multihead_self_attention(8, 2, *projections, x)
    torch.testing.assert_close(without[:, 0], with_rope[:, 0])
    assert not torch.allclose(without[:, 5], with_rope[:, 5], atol=1e-4)
    positions = torch.arange(12)
    torch.testing.assert_close(
        adapters.run_rope(8, 100.0, 16, x, positions)[:, 3],
        adapters.run_rope(8, 100.0, 16, x[:, 3:4], positions[3:4])[:, 0],
    )


def test_training_goes_through_the_adapters(tmp_path):
    torch.manual_seed(0)
    inputs, targets = adapters.run_get_batch(np.arange(100), 4, 7, "cpu")
    assert torch.equal(inputs + 1, targets)
    assert inputs.shape == (4, 7)
    net = torch.nn.Linear(7, 3)
    optimizer = adapters.get_adamw_cls()(net.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    net(inputs.float()).square().sum().backward()
    adapters.run_gradient_clipping(net.parameters(), 0.5)
    norm = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5), rtol=1e-4, atol=0)
    optimizer.step()
    adapters.run_save_checkpoint(net, optimizer, 11, tmp_path / "checkpoint.pt")
    other = torch.nn.Linear(7, 3)
    again = adapters.get_adamw_cls()(other.parameters())
    assert adapters.run_load_checkpoint(tmp_path / "checkpoint.pt", other, again) == 11
    assert torch.equal(net.weight, other.weight)
    assert adapters.run_get_lr_cosine_schedule(14, 1.0, 0.1, 7, 21) == 0.55


def test_the_handouts_tokenizer_example_goes_through_the_adapters(tmp_path):
    text = "low low low low low lower lower widest widest widest newest newest newest newest newest newest"
    (tmp_path / "corpus.txt").write_text(text)
    vocab, merges = adapters.run_train_bpe(tmp_path / "corpus.txt", 257 + 6, ["<|endoftext|>"])
    assert [left + right for left, right in merges[:3]] == [b"st", b"est", b"ow"]
    tokenizer = adapters.get_tokenizer(vocab, merges, ["<|endoftext|>"])
    assert tokenizer.decode(tokenizer.encode(text + "<|endoftext|>")) == text + "<|endoftext|>"
