r"""Deep prompts: m trainable tokens before the input of each attention module (VPT, arXiv 2203.12119).

In each block they pass its normalisation and the projections to keys and values, p -> LN(p) W_k, LN(p) W_v; what the
block would make of them is thrown away, as VPT does, so it is not computed. Where the tokens stand among the others is
of no account to attention: after the class token and before it are the same function.

An update changes no old output, as long as mean and spread of each token stay, if (NSP^2, NeurIPS 2024, eqs 24-25)

    q W_k^T gamma D^T = 0     for the queries of all heads        (right side)
    S / sigma D = 0           for their shares on the m tokens    (left side)

gamma being the normalisation's scale and sigma the spread of each token. To first order mean and spread stay if D is
orthogonal to the tokens and to the constant vector: they are rows on the right as well. Without normalisation
(`normalised=False`, or blocks that have none before attention) the conditions are exact. PEGP's (arXiv 2405.13383,
eqs 1-6) are x D^T = 0 and p D^T = 0 for the inputs x of the block: `conditions="paper"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import require_integer
from forgetcast.tuners.anatomy import Anatomy, Block
from forgetcast.tuners.attention import START, Beside, first, weight_of
from forgetcast.tuners.base import Conditions, Site
from forgetcast.tuners.placed import Heads, TunedInAttention, expanded, place

PART = "prompt"


class PromptPart(Beside):
    """Tokens of one block.

    Args:
        length: m.
        heads: of the attention module.
        gated: whether a gate starts at zero.
        norm: the normalisation before attention; None where there is none.
        project: tokens (n, m, d) to keys and values (n, m, k, width).
    """

    def __init__(self, length: int, heads: Heads, gated: bool, norm: nn.Module | None, project: Any) -> None:
        super().__init__(heads.keys, heads.width, gated)
        self.embedding = nn.Embedding(length, heads.inputs)
        nn.init.normal_(self.embedding.weight, std=START)
        self.frozen = (norm, project)  # in a tuple: they are the block's own, not parts of this one

    def tokens(self, samples: int) -> tuple[Float[Tensor, "n m k d"], Float[Tensor, "n m k d"]]:
        """Keys and values for each sample."""
        norm, project = self.frozen
        tokens = expanded(self.embedding, samples)
        keys, values = project(tokens if norm is None else norm(tokens))
        return keys, values

    def show(self, query: Float[Tensor, "n h l d"], shares: Float[Tensor, "n h l m"]) -> None:
        """Queries as the tokens meet them, and shares; all heads together."""
        tokens = self.embedding.weight.detach()
        norm = self.frozen[0]
        self.tell("affinity", lambda: _together(self._met(query)))
        self.tell("shares", lambda: _together(shares / spread(norm, tokens).to(shares)))
        if norm is not None:
            centred = tokens - tokens.mean(1, keepdim=True) if _centres(norm) else tokens
            rows = torch.cat([centred, torch.ones_like(tokens[:1])]) if _centres(norm) else centred
            self.tell("affinity", lambda: rows[None, :, None])
        self.tell_gate(query)

    def _met(self, query: Float[Tensor, "n h l d"]) -> Float[Tensor, "n h l c"]:
        norm, project = self.frozen
        like = self.embedding.weight
        unit = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        map_ = (project(unit[None])[0] - project(torch.zeros_like(unit)[None])[0])[0]  # c k width
        map_ = map_.repeat_interleave(query.shape[1] // self.heads, 1).to(query)
        rows = torch.einsum("nhld,chd->nhlc", query, map_)
        return rows if norm is None else rows * scale_of(norm, like).to(rows)

    def sites(self, name: str, conditions: Conditions) -> tuple[Site, ...]:
        """One matrix (m, d), acted on from both sides."""
        length, width = self.embedding.weight.shape
        names, parameters = (f"{name}.embedding.weight",), (weight_of(self.embedding),)
        if conditions == "corrected":
            right, left = self.space(name, "affinity", width, 1), self.space(name, "shares", length, 1)
            return Site(names, parameters, right=right, left=left), *self.gate_sites(name)
        inputs = self.space(name, "block inputs", width, 1)
        return Site(names, parameters, right=inputs), *(
            Site(site.names, site.parameters) for site in self.gate_sites(name)
        )

    def around(self, name: str, attention: nn.Module, block: nn.Module) -> list[Any]:
        """Also before the block, whose inputs the paper's conditions are about."""
        return [
            *super().around(name, attention, block),
            block.register_forward_pre_hook(self._entered, with_kwargs=True),
        ]

    def _entered(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.tell("block inputs", lambda: first(given, named)[None])
        self.tell("block inputs", lambda: self.embedding.weight[None, :, None])


@dataclass(frozen=True)
class Prompt:
    """Options of deep prompts.

    Attributes:
        length: m, tokens before each block.
        gated: whether a gate for each head, zero at the start, mixes attention with and without them; without it the
            model changes at once, as in VPT.
        normalised: whether the tokens pass the block's normalisation, as in VPT; without it they are what its output
            would be, and projection is exact.
        layers: which blocks get them; None for all.
    """

    length: int = 10
    gated: bool = True
    normalised: bool = True
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        require_integer("length", self.length, least=1)

    def attach(self, model: nn.Module, parts: Anatomy | None = None) -> TunedInAttention:
        """Put prompts into a model, in place, and freeze all else.

        Args:
            model: a transformer whose attention calls `scaled_dot_product_attention`.
            parts: where its blocks are; found by name if left out (`anatomy`).

        Raises:
            ValueError: a model with a tuner in place; one whose blocks, heads or projections cannot be found.
        """

        def made(block: Block, heads: Heads) -> Beside:
            norm = model.get_submodule(block.norm) if self.normalised and block.norm else None
            return PromptPart(self.length, heads, self.gated, norm, heads.projection(model, block))

        return place(model, self, parts, self.layers, PART, made)


def spread(norm: nn.Module | None, tokens: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """sigma, by which a normalisation divides each token; 1 where there is none."""
    if norm is None:
        return torch.ones_like(tokens[:, 0])
    centred = tokens - tokens.mean(1, keepdim=True) if _centres(norm) else tokens
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
    return (centred.square().mean(1) + epsilon).sqrt()


def scale_of(norm: nn.Module, like: Tensor) -> Float[Tensor, " d"]:
    """gamma, by which a normalisation multiplies, found from what it does to a token of signs."""
    signs = torch.ones_like(like[:1])
    signs[:, ::2] = -1
    unit = (signs - signs.mean() if _centres(norm) else signs) / spread(norm, signs)
    found: Tensor = (norm(signs) - norm(torch.zeros_like(signs))) / unit
    return found[0]


def _centres(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm)


def _together(rows: Float[Tensor, "n h l d"]) -> Float[Tensor, "1 n t d"]:
    return rows.flatten(1, 2)[None]
