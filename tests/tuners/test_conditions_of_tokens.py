"""The conditions of prefixes and prompts: what is watched is what outputs depend on, and both sides are needed."""

import pytest
import torch

pytest.importorskip("transformers")

from tuned_models import MaskedModel, hidden, inputs, small

from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import protect
from forgetcast.tuners.anatomy import anatomy
from forgetcast.tuners.base import Site
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt
from forgetcast.tuners.sites import sites_of


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


def test_the_papers_conditions_do_not_exist_for_grouped_queries(unchecked_types):
    tuned = Prefix().attach(small("llama"))
    with pytest.raises(ValueError, match=r"inputs of width 48 for keys of 2 heads of 12.*conditions='corrected'"):
        tuned.sites("paper")
    with pytest.raises(ValueError, match="conditions"):
        sites_of(tuned.model, "published")


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
        Prompt().attach(MaskedModel(Halved))
    model = MaskedModel(OwnLayerNorm).double()
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


def test_gates_that_never_opened_are_told_of():
    tuned = Prefix(length=16).attach(small("vit"))
    with pytest.warns(UserWarning, match=r"2 gates are zero in some heads and stand still from now on"):
        Projection(tuned.sites(), threshold=0.5).after(tuned.model, [inputs("vit", 1)], hidden)
