"""The whole model: causality, variants, cache, state dict, learning."""

import itertools
import shutil

import pytest
import torch
from torch.nn import functional as F

from lm import functional
from lm.functional import cross_entropy
from lm.model import TransformerConfig, TransformerLM
from lm.optim import AdamW

SMALL = {"vocab_size": 40, "context_length": 12, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 32}
VARIANTS = [
    {},
    {"norm": "post"},
    {"norm": "none"},
    {"position": "none"},
    {"ffn": "silu"},
    {"head": "tied"},
    {"attention": "fused"},
    {"activation_checkpointing": True},
    {"ffn": "relu2"},
    {"qk_norm": True},
    {"gated_attention": True, "num_layers": 1},
    {"value_embeddings": True, "num_layers": 4},
    {
        "ffn": "relu2",
        "qk_norm": True,
        "gated_attention": True,
        "value_embeddings": True,
        "num_layers": 3,
        "head": "tied",
        "activation_checkpointing": True,
    },
]
NEUTRAL_AT_FIRST = ("gate", "value_embeddings")  # parameters that begin with 0


def small_model(**variant):
    """A model in which each part does something: what begins with 0 is drawn as well."""
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(**SMALL | variant))
    for name, parameter in model.named_parameters():
        if any(part in name for part in NEUTRAL_AT_FIRST):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_future_cannot_change_the_past(variant):
    model = small_model(**variant)
    token_ids = torch.randint(40, (1, 12))
    embeddings = model.token_embeddings.weight[token_ids].detach().requires_grad_()
    model.token_embeddings.forward = lambda _: embeddings  # an instance attribute: gradients with respect to positions
    logits = model(token_ids)
    for position in (0, 5, 11):
        (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), embeddings, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached.tolist() == [i <= position for i in range(12)]


def test_the_order_of_the_tokens_matters():
    model = small_model()
    token_ids = torch.arange(12)
    swapped = torch.cat((token_ids[:10].flip(0), token_ids[10:]))
    assert not torch.allclose(model(token_ids)[-1], model(swapped)[-1], atol=1e-3)
    unordered = small_model(position="none", num_layers=1)
    torch.testing.assert_close(unordered(token_ids)[-1], unordered(swapped)[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[] if v in (VARIANTS[0], VARIANTS[-1]) else pytest.mark.slow) for v in VARIANTS],
    ids=str,
)
def test_each_variant_overfits_one_batch(variant):
    model = small_model(**variant)
    optimizer = AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    tokens = torch.randint(40, (2, 13))
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_the_state_dict_has_the_reference_names():
    names = {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"}
    for layer, name in itertools.product(
        (0, 1),
        ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ffn.w1", "ffn.w2", "ffn.w3", "ln1", "ln2"),
    ):
        names.add(f"layers.{layer}.{name}.weight")
    assert set(small_model().state_dict()) == names
    assert "lm_head.weight" not in small_model(head="tied").state_dict()
    assert not any("ln" in name for name in small_model(norm="none").state_dict())


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_the_first_loss_is_near_that_of_uniform_guessing(head):
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(**SMALL | {"vocab_size": 1000, "d_model": 64, "head": head}))
    tokens = torch.randint(1000, (16, 13))
    loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    assert 6.4 < loss < 8  # log(1000) = 6.9


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [3, 9]], ids=str)
@torch.no_grad()
def test_the_cache_equals_full_recomputation(variant, pieces):
    model = small_model(**variant)
    token_ids = torch.randint(40, (3, 12))
    cache = model.make_cache(3)
    logits = torch.cat([model(piece, cache) for piece in token_ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 12
    torch.testing.assert_close(logits, model(token_ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cache_can_be_rewound():
    model = small_model()
    token_ids = torch.randint(40, (2, 12))
    cache = model.make_cache(2)
    model(token_ids.flip(1), cache)
    cache.length = 0
    model(token_ids[:, :8], cache)
    cache.length = 4
    torch.testing.assert_close(model(token_ids[:, 4:], cache), model(token_ids)[:, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cache_takes_what_autocast_makes():
    model = small_model()
    token_ids = torch.randint(40, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.make_cache(2)
        model(token_ids[:, :4], cache)
        cache.length = 5
        last = model(token_ids[:, 4:], cache, token_positions=torch.tensor([[4], [4]]))
        torch.testing.assert_close(last, model(token_ids)[:, 4:], rtol=0.05, atol=0.05)


def test_too_many_positions_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="13 tokens after 0 exceed the context_length=12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    cache = model.make_cache(1, max_length=6)
    model(torch.zeros(1, 6, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="1 tokens after 6 exceed the cache's max_length=6"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=r"max_length=13 must be in \[1, context_length=12\]"):
        model.make_cache(1, max_length=13)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_any_leading_dimensions(shape):
    model = small_model()
    token_ids = torch.randint(40, shape)
    torch.testing.assert_close(model(token_ids).reshape(-1, 7, 40), model(token_ids.reshape(-1, 7)))


@pytest.mark.parametrize("variant", [{}, {"head": "tied"}], ids=str)
def test_targets_give_the_loss_of_the_logits(variant):
    model = small_model(**variant)
    tokens = torch.randint(40, (2, 13))
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    expected = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autocast_is_near_float32(variant):
    model = small_model(**variant)
    tokens = torch.randint(40, (2, 13))
    exact = model(tokens[:, :-1], targets=tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens[:, :-1], targets=tokens[:, 1:])
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (rough, exact)), strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("variant", [{}, {"norm": "post"}, {"norm": "none"}, {"value_embeddings": True}], ids=str)
def test_autocast_keeps_the_residual_stream_in_its_dtype_and_the_weights_in_theirs(variant):
    """Half the memory traffic of every norm and sum."""
    model = small_model(**variant)
    streams = []
    for block in model.layers:
        block.register_forward_hook(lambda _, inputs, output: streams.extend([inputs[0].dtype, output.dtype]))
    tokens = torch.randint(40, (2, 13))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert set(streams) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    model(tokens[:, 1:])
    assert streams[-1] == torch.float32
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        model(tokens[:, 1:])
    assert streams[-1] == torch.float32


@pytest.mark.parametrize("option", ["gated_attention", "value_embeddings"])
def test_what_begins_with_nothing_to_say_changes_nothing_at_first(option):
    torch.manual_seed(0)
    plain, more = (TransformerLM(TransformerConfig(**SMALL | {"num_layers": 3, option: on})) for on in (False, True))
    more.load_state_dict(plain.state_dict(), strict=False)
    token_ids = torch.randint(40, (2, 12))
    assert torch.equal(more(token_ids), plain(token_ids))
    added = [p for name, p in more.named_parameters() if name not in plain.state_dict()]
    assert added
    for gradient in torch.autograd.grad(more(token_ids).square().sum(), added):
        assert gradient.abs().sum() > 0, "it learns to say something"


def test_zero_output_begins_at_uniform_guessing_and_trains_every_matrix():
    model = small_model(init="zero_output")
    tokens = torch.randint(40, (2, 13))
    assert model(tokens[:, :-1]).eq(0).all()
    zeros = {name for name, p in model.named_parameters() if p.eq(0).all()}
    assert zeros == {"lm_head.weight"} | {
        f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("attn.output_proj", "ffn.w2")
    }
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(3):  # the head moves first, then the outputs, then what is behind them
        optimizer.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_qk_norm_makes_the_scores_blind_to_the_size_of_queries_and_keys():
    model = small_model(qk_norm=True)
    token_ids = torch.randint(40, (2, 12))
    before = model(token_ids)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.q_proj.weight.mul_(100)
            layer.attn.k_proj.weight.mul_(0.1)
    torch.testing.assert_close(model(token_ids), before, rtol=1e-2, atol=1e-2)
    plain = small_model()
    assert not torch.allclose(plain(token_ids), before, atol=0.1)


def test_value_embeddings_stand_in_every_other_layer_up_to_the_last():
    config = TransformerConfig(**SMALL | {"num_layers": 5, "value_embeddings": True})
    assert config.layers_with_value_embeddings == [0, 2, 4]
    assert len(TransformerLM(config).value_embeddings) == 3
    assert TransformerConfig(**SMALL).layers_with_value_embeddings == []


def test_activation_checkpointing_gives_the_same_gradients():
    tokens = torch.randint(40, (2, 13))
    results = []
    for checkpointing in (False, True):
        model = small_model(activation_checkpointing=checkpointing)
        loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide d_model=16"),
        ({"d_model": 6}, "d_model=6 over num_heads=2 gives heads of odd length 3"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"norm": "layer"}, "norm='layer' must be one of pre, post, none"),
        ({"position": "sine"}, "position='sine' must be one of rope, none"),
        ({"ffn": "relu"}, "ffn='relu' must be one of swiglu, silu, relu2"),
        ({"init": "zeros"}, "init='zeros' must be one of standard, zero_output"),
        ({"head": "both"}, "head='both' must be one of untied, tied"),
        ({"attention": "flash"}, "attention='flash' must be one of scratch, fused"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    config = object.__new__(TransformerConfig)  # past the type checks of the test run, which know the literals too
    vars(config).update(vars(TransformerConfig(**SMALL)) | change)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()


def test_a_saved_configuration_may_have_what_is_no_more_if_it_was_off():
    saved = SMALL | {"logit_softcap": None}
    assert TransformerConfig.from_saved(saved) == TransformerConfig(**SMALL)
    with pytest.raises(ValueError, match=r"logit_softcap=15\.0 is a setting that is no more: logs/leaderboard"):
        TransformerConfig.from_saved(saved | {"logit_softcap": 15.0})
    with pytest.raises(ValueError, match="twist=True is a setting that this version does not know"):
        TransformerConfig.from_saved(saved | {"twist": True})


def test_bfloat16_parameters_give_finite_logits_near_float32():
    model = small_model()
    token_ids = torch.randint(40, (2, 12))
    expected = model(token_ids)
    logits = model.bfloat16()(token_ids)
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.995


def compare_compiled_with_eager(_, backend, variants):
    for variant in variants:
        functional.COMPILED_QUERIES = (
            5 if variant == variants[0] else 256
        )  # attention in three blocks, the last smaller
        torch.compiler.reset()  # it gives up on a function that it has compiled for eight models
        model = small_model(**{"num_layers": 1} | variant)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        tokens = torch.randint(40, (2, 13))
        results = []
        for forward in (compiled, model):
            loss = forward(tokens[:, :-1], targets=tokens[:, 1:])
            results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "variants"), [("aot_eager", VARIANTS), ("inductor", [{}])], ids=["traced", "compiled"]
)
def test_compiled_equals_eager(backend, variants):
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    # in a process of its own: the compiler cannot read through the type checks of the test run
    torch.multiprocessing.spawn(compare_compiled_with_eager, (backend, variants))
