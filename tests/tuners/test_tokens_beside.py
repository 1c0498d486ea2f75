"""Prefixes and prompts: what they compute, what their conditions protect, whose attention they can enter."""

import copy
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tuned_models import KINDS, LAYERS, hidden, inputs, small  # noqa: E402 - these import transformers

from forgetcast.protect.projection import Projection  # noqa: E402
from forgetcast.protect.restraint import protect  # noqa: E402
from forgetcast.tuners.anatomy import Anatomy, anatomy  # noqa: E402
from forgetcast.tuners.base import Site  # noqa: E402
from forgetcast.tuners.prefix import Prefix  # noqa: E402
from forgetcast.tuners.prompt import Prompt  # noqa: E402
from forgetcast.tuners.sites import sites_of  # noqa: E402

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


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_of_shallow_prompts_projection_protects_the_first_block():
    """What the first block makes of old tokens stays; the later ones see the prompts themselves change."""
    tuned = warm(Prompt(length=16, depth="shallow"))
    sites = [site for site in tuned.sites() if "embedding" in site.names[0]]
    old, new = inputs("vit", 1), inputs("vit", 3, seed=9)
    first = tuned.model.get_submodule(anatomy(tuned.model).blocks[0].name)
    seen: list = []
    handle = first.register_forward_hook(lambda _, __, found: seen.append(found[:, 16:].detach()))
    last = moved(tuned.model, tuple(sites), old, new, True)
    handle.remove()
    before, after = (states for states in (seen[1], seen[-1]) if len(states) == 1)
    assert torch.allclose(before, after, atol=1e-9)
    assert last > 1e-6


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


def test_attention_that_is_computed_by_hand_is_refused():
    model = small("vit")
    model.set_attn_implementation("eager")
    tuned = Prefix().attach(model)
    with pytest.raises(ValueError, match=r"computes attention by itself.*expected a call of .*scaled_dot_product"):
        hidden(model, inputs("vit", 1))
    model.set_attn_implementation("sdpa")
    hidden(model, inputs("vit", 1))
    assert not torch.overrides._get_current_function_mode_stack()
    tuned.detach()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_inside_attention_leaves_nothing_behind(error):
    model = small("vit")
    tuned = Prefix().attach(model)

    def fail(*_: object) -> None:
        raise error

    handle = model.get_submodule(anatomy(model).blocks[1].query).register_forward_hook(fail)
    with pytest.raises(error):
        hidden(model, inputs("vit", 1))
    assert not torch.overrides._get_current_function_mode_stack()
    handle.remove()
    assert hidden(model, inputs("vit", 1)).isfinite().all()
    tuned.detach()


def moved(model, sites, old, batch, conditions_hold) -> float:
    """Relative change of old outputs after projected AdamW steps on another batch."""
    projection = Projection(sites, threshold=1.0)
    if conditions_hold:
        projection = projection.after(model, [old], lambda net, given: hidden(net, given))
    parameters = [parameter for site in sites for parameter in site.parameters]
    start = [parameter.detach().clone() for parameter in parameters]
    before = hidden(model, old).detach()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    with protect(optimizer, projection):
        for _ in range(30):
            optimizer.zero_grad()
            hidden(model, batch).sin().square().mean().backward()
            optimizer.step()
    after = hidden(model, old).detach()
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    return float((after - before).norm() / before.norm())


def warm(options, kind="vit", **sizes):
    model = small(kind, **sizes)
    tuned = options.attach(model)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        hidden(model, inputs(kind, 4, seed=5)).sin().square().mean().backward()
        optimizer.step()
    return tuned


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_key_prefixes_need_their_queries_head_by_head():
    """GT4: all heads together constrain only the sum over heads; the paper's inputs in place of queries nothing."""
    tuned = warm(Prefix(length=16))
    keys, *_ = (site for site in tuned.sites() if "keys" in site.names[0])
    part = tuned.model.get_submodule(keys.names[0].rsplit(".", 2)[0])
    old, new = inputs("vit", 1), inputs("vit", 3, seed=9)

    def joint(query: torch.Tensor) -> torch.Tensor:
        return query.transpose(1, 2).flatten(2)[None]

    together = part.space("keys", "together", 24, 1)
    show = part.show
    part.show = lambda query, shares: (show(query, shares), part.tell("together", lambda: joint(query)))[0]
    by_head = moved(tuned.model, (keys,), old, new, True)
    side_by_side = moved(tuned.model, (Site(keys.names, keys.parameters, right=together),), old, new, True)
    paper = [site for site in sites_of(tuned.model, "paper") if site.names == keys.names]
    as_published = moved(tuned.model, tuple(paper), old, new, True)
    assert by_head < 1e-12
    assert min(side_by_side, as_published) > 1e-6


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_prompts_need_both_sides():
    tuned = warm(Prompt(length=16, normalised=False))
    (site, *_) = (site for site in tuned.sites() if "embedding" in site.names[0])
    old, new = inputs("vit", 1), inputs("vit", 3, seed=9)
    both = moved(tuned.model, (site,), old, new, True)
    right = moved(tuned.model, (Site(site.names, site.parameters, right=site.right),), old, new, True)
    left = moved(tuned.model, (Site(site.names, site.parameters, left=site.left),), old, new, True)
    (paper, *_) = (one for one in sites_of(tuned.model, "paper") if one.names == site.names)
    published = moved(tuned.model, (paper,), old, new, True)
    assert both < 1e-12
    assert min(right, left, published) > 1e-6


def test_the_papers_conditions_do_not_exist_for_grouped_queries(unchecked_types):
    tuned = Prefix().attach(small("llama"))
    with pytest.raises(ValueError, match=r"inputs of width 48 for keys of 2 heads of 12.*conditions='corrected'"):
        tuned.sites("paper")
    with pytest.raises(ValueError, match="conditions"):
        sites_of(tuned.model, "published")


def test_heads_that_nothing_names_are_asked_for():
    model = small("fused")
    for k in range(LAYERS):
        del model.blocks[k].attn.num_heads
    with pytest.raises(ValueError, match=r"heads of blocks.0.attn.*num_heads"):
        Prefix().attach(model)
    for k in range(LAYERS):
        model.blocks[k].attn.num_heads = 5
    with pytest.raises(ValueError, match=r"72 outputs for 5 heads of 4.*expected 60 outputs"):
        Prefix().attach(model)
    assert not [name for name, _ in model.named_parameters() if "prefix" in name]


def test_copies_do_not_share_their_frozen_layers():
    tuned = Prompt(length=3, gated=False).attach(small("vit"))
    other = copy.deepcopy(tuned.model)
    before = hidden(other, inputs("vit", 1)).detach()
    with torch.no_grad():
        for block in anatomy(tuned.model).blocks:
            tuned.model.get_submodule(block.key).weight.zero_()
    assert torch.equal(hidden(other, inputs("vit", 1)), before)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler
@pytest.mark.parametrize("options", [Prefix(length=3), Prompt(length=3, gated=False)])
def test_a_compiled_model_computes_the_same(unchecked_types, options):
    tuned = options.attach(small("fused"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    expected = hidden(tuned.model, inputs("fused", 2)).detach()
    found = torch.compile(tuned.model, backend="eager")(**inputs("fused", 2)).detach()
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_forward_that_somebody_else_has_put_in_place_stays():
    model = small("fused")
    calls: list = []
    attention = model.blocks[0].attn
    plain = attention.forward
    attention.forward = lambda x: calls.append(1) or plain(x)
    own = attention.forward
    before = hidden(model, inputs("fused", 1)).detach()
    tuned = Prefix(length=3).attach(model)
    assert torch.allclose(hidden(model, inputs("fused", 1)), before, atol=1e-12)
    tuned.detach()
    assert attention.forward is own
    assert "forward" not in vars(model.blocks[1].attn)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2", "gpt_neox", "bert"])
@pytest.mark.parametrize("scale", [None, 0.11])
def test_what_is_watched_is_what_outputs_depend_on(kind, scale):
    """Dense: derivatives of attention's logits by a token at fixed spread, and the shares of softmax under masks."""
    tuned = Prompt(length=3).attach(small(kind))
    part = tuned.model.get_submodule(anatomy(tuned.model).blocks[0].attention).prompt
    batch = inputs(kind, 2)
    if "input_ids" in batch:
        batch |= {"attention_mask": (torch.arange(5) < torch.tensor([[5], [3]])).long()}
    calls: list = []
    attend = part.attend

    def kept(query, key, value, attn_mask=None, is_causal=False, **named):
        calls.append((query.detach(), key.detach(), attn_mask, is_causal))
        named |= {} if scale is None else {"scale": scale}
        return attend(query, key, value, attn_mask, is_causal=is_causal, **named)

    part.attend = kept
    right, left = tuned.sites()[0].right, tuned.sites()[0].left
    shown: list = []
    with right.watch(shown.append), left.watch(shown.append), torch.no_grad():
        hidden(tuned.model, batch)
    affinity, shares = shown
    ((query, key, mask, causal),) = calls
    length = query.shape[-1] ** -0.5 if scale is None else scale
    tokens, norm = part.embedding.weight.detach(), part.norm
    spread = torch.ones(3, dtype=torch.float64) if norm is None else norm.spread(tokens)

    def logits(given: torch.Tensor) -> torch.Tensor:
        if norm is not None:
            given = norm.centred(given) / spread[:, None] * norm.module.weight
            given = given + getattr(norm.module, "bias", torch.zeros(()))
        keys = part.project(given[None])[0].transpose(1, 2)
        return length * query @ keys.repeat_interleave(query.shape[1] // part.heads, 1).mT

    own = length * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask
    elif causal:
        own = own.masked_fill(~torch.ones(own.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    expected = torch.cat([logits(tokens), own], 3).softmax(3)[..., :3] / spread
    assert torch.allclose(shares[0], expected.flatten(1, 2), atol=1e-6)  # RMSNorm computes in single precision
    jacobian = torch.func.jacrev(logits)(tokens)  # n h l m, m d
    folded = right.fold(affinity.flatten(1, 2).mT @ affinity.flatten(1, 2))[0]
    for k in range(3):
        rows = jacobian[..., k, k, :].flatten(0, 2) * spread[k] / length
        assert torch.allclose(rows.T @ rows, folded, atol=1e-6 * float(folded.abs().max()))


class OwnAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, x, mask):
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        return found.transpose(1, 2).flatten(2)


class OwnBlock(torch.nn.Module):
    def __init__(self, norm=torch.nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.attn = norm(8), OwnAttention()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(x)


class OwnModel(torch.nn.Module):
    def __init__(self, norm=torch.nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([OwnBlock(norm), OwnBlock(norm)])

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_masks_of_tokens_let_prompts_be_seen(depth):
    """A mask (n, t) of tokens that are there: with all there the answer is that of attention without any mask."""
    torch.manual_seed(0)
    model = OwnModel()
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    before = model(x, mask).detach()
    Prompt(length=3, depth=depth, gated=False).attach(model)
    whole = model(x, mask).detach()
    assert not torch.allclose(whole, before, atol=1e-3)
    longer = torch.cat([x, torch.randn(2, 2, 8)], 1)
    hiding = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], 1)
    assert torch.allclose(model(longer, hiding)[:, :5], whole, atol=1e-5)


class Halved(torch.nn.Module):
    """No normalisation of any kind that is known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x):
        return torch.tanh(x)


class OwnLayerNorm(torch.nn.Module):
    """A LayerNorm of somebody's own, without a bias, its scale one too small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.randn(width))
        self.eps = 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_normalisations_are_understood_or_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="a Halved before attention, which is neither a LayerNorm nor an RMSNorm"):
        Prompt().attach(OwnModel(Halved))
    model = OwnModel(OwnLayerNorm).double()
    tuned = Prompt(length=16).attach(model)
    assert tuned.model.blocks[0].attn.prompt.norm.centres
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    mask = torch.ones(1, 2, dtype=torch.bool)
    old, new = torch.randn(1, 2, 8, dtype=torch.float64), torch.randn(1, 2, 8, dtype=torch.float64)
    before = model(old, mask).detach()
    projection = Projection(tuned.sites(), threshold=1.0).after(model, [old], lambda net, x: net(x, mask))

    def moved(projection) -> float:
        optimizer = torch.optim.Adam(tuned.parameters(), lr=0.01)
        with protect(optimizer, projection):
            for _ in range(10):
                optimizer.zero_grad()
                model(new, mask).sin().square().mean().backward()
                optimizer.step()
        return float((model(old, mask).detach() - before).norm() / before.norm())

    assert moved(projection) < 1e-10
    assert moved(Projection(tuned.sites())) > 1e-4


def test_blocks_that_are_not_as_described_are_refused():
    model = small("vit")
    blocks = anatomy(model).blocks
    nameless = Anatomy(tuple(replace(block, norm=None) for block in blocks))
    tuned = Prompt().attach(model, nameless)
    with pytest.raises(ValueError, match=r"attention inputs of a block without a normalisation.*norm= in the anatomy"):
        hidden(model, inputs("vit", 2))
    tuned.detach()
    swapped = Anatomy(tuple(replace(block, key=block.value, value=block.key) for block in blocks))
    tuned = Prompt().attach(model, swapped)
    with pytest.raises(ValueError, match=r"values of each head that are \d+% from what the block has"):
        hidden(model, inputs("vit", 2))
    tuned.detach()
    rows = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen3Config(**rows, num_key_value_heads=2, intermediate_size=32, head_dim=12)
    torch.manual_seed(0)
    model = transformers.Qwen3Model(config).eval()
    with torch.no_grad():
        model.layers[0].self_attn.k_norm.weight.fill_(3.0)
    tuned = Prompt().attach(model)
    with pytest.raises(ValueError, match=r"lengths of keys .*Take Prefix"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    tuned.detach()
    Prefix().attach(model)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_gates_that_never_opened_are_told_of():
    tuned = Prefix(length=16).attach(small("vit"))
    with pytest.warns(UserWarning, match=r"2 gates are zero in some heads and stand still from now on"):
        Projection(tuned.sites(), threshold=0.5).after(tuned.model, [inputs("vit", 1)], hidden)
