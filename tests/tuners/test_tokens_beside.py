"""Prefixes and prompts: what their tokens compute, and what sees them."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tuned_models import KINDS, MaskedModel, hidden, inputs, small

from forgetcast.tuners.anatomy import anatomy
from forgetcast.tuners.placed import Heads
from forgetcast.tuners.prefix import Prefix, PrefixPart
from forgetcast.tuners.prompt import Prompt
from forgetcast.tuners.shallow import Carried

BESIDE = [
    Prefix(length=3, gated=False),
    Prefix(length=3),
    Prompt(length=3, gated=False),
    Prompt(length=3, gated=False, depth="shallow"),
    Prompt(length=3, depth="shallow"),
]
ENCODERS = ["vit", "clip", "dinov2", "fused"]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("after", [0, 1])
def test_deep_prompts_are_tokens_put_into_each_block_and_taken_out_behind_it(kind, after):
    """The published procedure, done by hand on the plain model, before or after the class token."""
    tuned = Prompt(length=4, gated=False).attach(small(kind))
    plain = small(kind)
    blocks = [plain.get_submodule(block.name) for block in anatomy(plain).blocks]
    tokens = [parameter.detach() for parameter in tuned.parameters()]

    def put(_, given, named, own):
        x = given[0]
        return (torch.cat([x[:, :after], own.expand(len(x), -1, -1), x[:, after:]], 1), *given[1:]), named

    def take(_, __, found):
        x = found[0] if isinstance(found, tuple) else found
        x = torch.cat([x[:, :after], x[:, after + 4 :]], 1)
        return (x, *found[1:]) if isinstance(found, tuple) else x

    for block, own in zip(blocks, tokens, strict=True):
        block.register_forward_pre_hook(lambda *given, own=own: put(*given, own), with_kwargs=True)
        block.register_forward_hook(take)
    expected = hidden(plain, inputs(kind, 3))
    assert torch.allclose(hidden(tuned.model, inputs(kind, 3)), expected, atol=1e-12)
    assert not torch.allclose(hidden(small(kind), inputs(kind, 3)), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_shallow_prompts_are_tokens_put_in_once(kind):
    tuned = Prompt(length=4, gated=False, depth="shallow").attach(small(kind))
    plain = small(kind)
    first, *_, last = (plain.get_submodule(block.name) for block in anatomy(plain).blocks)
    (tokens,) = (parameter.detach() for parameter in tuned.parameters())

    def put(_, given):
        return torch.cat([given[0][:, :1], tokens.expand(len(given[0]), -1, -1), given[0][:, 1:]], 1), *given[1:]

    first.register_forward_pre_hook(put)
    last.register_forward_hook(lambda _, __, found: torch.cat([found[:, :1], found[:, 5:]], 1))
    expected = hidden(plain, inputs(kind, 3))
    assert torch.allclose(hidden(tuned.model, inputs(kind, 3)), expected, atol=1e-12)
    assert not torch.allclose(hidden(small(kind), inputs(kind, 3)), expected, atol=1e-3)


def test_shallow_prompts_stand_before_whole_sequences():
    tuned = Prompt(length=3, depth="shallow").attach(small("llama"))
    ids = inputs("llama", 1)["input_ids"]
    found = tuned.model(input_ids=ids[:, :3], use_cache=True)
    with pytest.raises(ValueError, match="a cache of earlier tokens with shallow prompts"):
        tuned.model(input_ids=ids[:, 3:], past_key_values=found.past_key_values)
    with pytest.raises(ValueError, match=r"layers=\[0, 2\] for shallow prompts"):
        Prompt(depth="shallow", layers=[0, 2]).attach(deeper())
    with pytest.raises(ValueError, match="shallow prompts with normalised=False"):
        Prompt(depth="shallow", normalised=False)


def deeper():
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
        )
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fused"])
def test_prompts_meet_the_projections_of_their_block(kind):
    """Of prompts equal to what attention is given come the very values that it computes, and keys up to rotation."""
    model = small(kind)
    block = anatomy(model).blocks[0]
    tuned = Prompt(length=3, normalised=False).attach(model)
    attention = model.get_submodule(block.attention)
    given: list = []
    handle = attention.register_forward_pre_hook(
        lambda _, args, named: given.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    seen: list = []
    part = attention.prompt
    attend = part.attend
    part.attend = lambda query, key, value, *rest, **named: (
        seen.append((key, value)) or attend(query, key, value, *rest, **named)
    )
    with torch.no_grad():
        hidden(model, inputs(kind, 1))
        handle.remove()
        (x,), ((key, value), *_) = given, seen
        part.embedding.weight.copy_(x[0, :3])
        own_key, own_value = part.tokens(1)
    copies = value.shape[1] // own_value.shape[2]
    assert torch.allclose(own_value[0].transpose(0, 1).repeat_interleave(copies, 0), value[0, :, :3], atol=1e-10)
    places = [0] if kind in ("llama", "gpt_neox") else [0, 1, 2]  # the first place is not rotated
    keys = own_key[0].transpose(0, 1).repeat_interleave(copies, 0)
    assert torch.allclose(keys[:, places], key[0, :, places], atol=1e-10)
    tuned.detach()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("options", BESIDE)
def test_padding_stays_unseen(kind, options):
    tuned = options.attach(small(kind))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    ids = inputs(kind, 2)["input_ids"]
    alone = hidden(tuned.model, {"input_ids": ids})
    longer = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (torch.arange(8) < 5).long().expand(2, -1)
    beside = hidden(tuned.model, {"input_ids": longer, "attention_mask": mask})
    assert torch.allclose(beside[:, :5], alone, atol=1e-12)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_masks_of_tokens_let_prompts_be_seen(depth):
    """A mask (n, t) of tokens that are there: with all there the answer is that of attention without any mask."""
    torch.manual_seed(0)
    model = MaskedModel()
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    before = model(x, mask).detach()
    Prompt(length=3, depth=depth, gated=False).attach(model)
    whole = model(x, mask).detach()
    assert not torch.allclose(whole, before, atol=1e-3)
    longer = torch.cat([x, torch.randn(2, 2, 8)], 1)
    hiding = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], 1)
    assert torch.allclose(model(longer, hiding)[:, :5], whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("options", [Prefix(length=3, gated=False), Prompt(length=3)])
def test_generation_with_a_cache_is_that_without(kind, options):
    tuned = options.attach(small(kind))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    ids = inputs(kind, 2)["input_ids"]
    whole = hidden(tuned.model, {"input_ids": ids})
    first = tuned.model(input_ids=ids[:, :3], use_cache=True)
    second = tuned.model(input_ids=ids[:, 3:4], past_key_values=first.past_key_values, use_cache=True)
    third = tuned.model(input_ids=ids[:, 4:], past_key_values=second.past_key_values, use_cache=True)
    stepwise = torch.cat([found.last_hidden_state for found in (first, second, third)], 1)
    assert torch.allclose(stepwise, whole, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", BESIDE)
def test_no_token_sees_a_later_one(options, kind, masked):
    tuned = options.attach(small(kind))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    ids = inputs(kind, 2)["input_ids"]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 50
    mask = torch.ones_like(ids)
    mask[1, 0] = 1 - masked  # padding on the left
    before, after = (hidden(tuned.model, {"input_ids": one, "attention_mask": mask}) for one in (ids, other))
    assert torch.allclose(before[:, 1:-1], after[:, 1:-1], atol=1e-12)
    assert not torch.allclose(before[:, -1], after[:, -1])


def dense(query, key, value, mask, scale):
    """softmax(scale q k^T + mask), head by head, and the values mixed by it."""
    group = query.shape[1] // key.shape[1]
    shares = torch.stack(
        [(scale * query[:, h] @ key[:, h // group].mT + mask).softmax(-1) for h in range(query.shape[1])], 1
    )
    return shares, torch.stack([shares[:, h] @ value[:, h // group] for h in range(query.shape[1])], 1)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("scale", [None, 0.11])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "causal"])
@pytest.mark.parametrize("carried", [False, True])
def test_attention_and_its_shares_are_those_of_the_dense_formula(kind, scale, copies, carried):
    """Of grouped queries, whose keys are repeated or not; with a gate of its own for each head of keys."""
    torch.manual_seed(0)
    heads, m, t = Heads(24, 4, 2, 6), 3, 5
    part = (Carried(m, heads, gated=True) if carried else PrefixPart(m, heads, gated=True)).double()
    torch.nn.init.normal_(part.gate.weight)
    first, t = (m, m + t) if carried else (0, t)
    query, key, value = (torch.randn(2, count, t, 6, dtype=torch.float64) for count in (4, 2, 2))
    ahead = torch.randn(t, t) < 0.5
    ahead |= torch.eye(t, dtype=torch.bool)
    mask = {"boolean": ahead, "additive": torch.randn(t, t, dtype=torch.float64)}.get(kind)
    added = torch.zeros(t, t, dtype=torch.float64) if mask is None or kind == "boolean" else mask
    if kind in ("boolean", "causal"):
        seen = ahead if kind == "boolean" else torch.ones(t, t, dtype=torch.bool).tril()
        added = added.masked_fill(~seen, -torch.inf)

    shown: list = []
    part.show = lambda query, shares: shown.append((query, shares))
    given = {"is_causal": kind == "causal", "scale": scale, "enable_gqa": copies == 1}
    repeated = (each.repeat_interleave(copies, 1) for each in (key, value))
    with torch.no_grad(), part.space("part", "gate", 1, 1).watch(shown.append):
        found = part.attend(query, *repeated, mask, **given)
        plain = dense(
            query[:, :, first:], key[:, :, first:], value[:, :, first:], added[first:, first:], scale or 6**-0.5
        )
        if not carried:
            tokens = [each.transpose(1, 2) for each in part.tokens(2)]
            key, value = (torch.cat(pair, 2) for pair in zip(tokens, (key, value), strict=True))
            added = torch.nn.functional.pad(added, (m, 0))
        shares, joined = dense(query, key, value, added, scale or 6**-0.5)
    gates = part.gate.weight.detach()[0, [0, 0, 1, 1], None, None]
    expected = plain[1] + gates * (joined[:, :, first:] - plain[1])
    torch.testing.assert_close(found, torch.cat([joined[:, :, :first], expected], 2))
    ((told, of_tokens),) = shown
    torch.testing.assert_close(told, query[:, :, first:])
    torch.testing.assert_close(of_tokens, shares[:, :, first:, :m])


@pytest.mark.parametrize("carried", [False, True])
def test_dropout_of_attention_falls_on_tokens_too(carried):
    """Where all shares are dropped nothing is left."""
    heads = Heads(24, 4, 4, 6)
    part = Carried(3, heads, gated=True) if carried else PrefixPart(3, heads, gated=True)
    torch.nn.init.ones_(part.gate.weight)
    query, key, value = torch.randn(3, 2, 4, 5, 6)
    assert not part.attend(query, key, value, dropout_p=1.0).any()
    assert part.attend(query, key, value).all()
