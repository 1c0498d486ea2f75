r"""Deep prompts: m trainable tokens before the input of each attention module (VPT, arXiv 2203.12119).

In each block they pass its normalisation and the projections to keys and values, p -> LN(p) W_k, LN(p) W_v; what the
block would make of them is thrown away, as VPT does, so it is not computed. Where the tokens stand among the others is
of no account to attention: after the class token and before it are the same function.

An update D changes no old output if (NSP^2, NeurIPS 2024, eqs 24-25, with the parts of the normalisation)

    C gamma W_k q D^T = 0     for the queries of all heads        (right side; C takes the mean off)
    S / sigma D = 0           for their shares on the m tokens    (left side)
    sigma                     stays: the spread of each token, by which the normalisation divides

gamma being the normalisation's scale. Without normalisation (`normalised=False`, or blocks that have none before
attention) the first two are enough, with C, gamma and sigma left out. PEGP's conditions (arXiv 2405.13383, eqs 1-6)
are x D^T = 0 and p D^T = 0 for the inputs x of the block: `conditions="paper"`.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.tuners.attention import START, Added, first, weight_of
from forgetcast.tuners.base import Conditions, Site
from forgetcast.tuners.placed import Heads, expanded


class PromptPart(Added):
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
        tokens = self.prompts(samples)
        keys, values = project(tokens if norm is None else norm(tokens))
        return keys, values

    def prompts(self, samples: int) -> Float[Tensor, "n m d"]:
        """The tokens, for each sample."""
        return expanded(self.embedding, samples)

    def show(self, query: Float[Tensor, "n h l d"], shares: Float[Tensor, "n h l m"]) -> None:
        """Queries as the tokens meet them, and shares; all heads together."""
        tokens, norm = self.embedding.weight.detach(), self.frozen[0]
        self.tell("affinity", lambda: _together(self._met(query)))
        self.tell("shares", lambda: _together(shares / spread(norm, tokens).to(shares)))
        super().show(query, shares)

    def _met(self, query: Float[Tensor, "n h l d"]) -> Float[Tensor, "n h l c"]:
        norm, project = self.frozen
        like = self.embedding.weight
        unit = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        map_ = (project(unit[None])[0] - project(torch.zeros_like(unit)[None])[0])[0]  # c k width
        map_ = map_.repeat_interleave(query.shape[1] // self.heads, 1).to(query)
        rows = torch.einsum("nhld,chd->nhlc", query, map_)
        return rows if norm is None else centred(norm, rows * scale_of(norm, like).to(rows))

    def sites(self, name: str, conditions: Conditions) -> tuple[Site, ...]:
        """One matrix (m, d), acted on from both sides."""
        length, width = self.embedding.weight.shape
        names, parameters = (f"{name}.embedding.weight",), (weight_of(self.embedding),)
        gate = super().sites(name, conditions)
        if conditions == "paper":
            return Site(names, parameters, right=self.space(name, "block inputs", width, 1)), *gate
        right, left = self.space(name, "affinity", width, 1), self.space(name, "shares", length, 1)
        norm = self.frozen[0]
        kept = None if norm is None else partial(centred, norm)
        return Site(names, parameters, right=right, left=left, centred=kept), *gate

    def around(self, name: str, attention: nn.Module, block: nn.Module) -> list[Any]:
        """Also before the block, whose inputs the paper's conditions are about."""
        return [
            *super().around(name, attention, block),
            block.register_forward_pre_hook(self._entered, with_kwargs=True),
        ]

    def _entered(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.tell("block inputs", lambda: first(given, named)[None])
        self.tell("block inputs", lambda: self.embedding.weight[None, :, None])


def centred(norm: nn.Module, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Rows less their means, if that is what a normalisation does: LayerNorm does, RMSNorm does not."""
    return rows - rows.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else rows


def spread(norm: nn.Module | None, tokens: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """sigma, by which a normalisation divides each token; 1 where there is none."""
    if norm is None:
        return torch.ones_like(tokens[:, 0])
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
    return (centred(norm, tokens).square().mean(1) + epsilon).sqrt()


def scale_of(norm: nn.Module, like: Tensor) -> Float[Tensor, " d"]:
    """gamma, by which a normalisation multiplies, found from what it does to a token of signs."""
    signs = torch.ones_like(like[:1])
    signs[:, ::2] = -1
    unit = centred(norm, signs) / spread(norm, signs)
    found: Tensor = (norm(signs) - norm(torch.zeros_like(signs))) / unit
    return found[0]


def _together(rows: Float[Tensor, "n h l d"]) -> Float[Tensor, "1 n t d"]:
    return rows.flatten(1, 2)[None]
