r"""Prefix tuning: m trainable keys and values for each head of each attention module (arXiv 2101.00190).

Key prefixes act on queries, q P_k^T, head by head; value prefixes are read with the shares of attention that go to
them, S P_v, head by head. An update that vanishes on old queries, and one on old shares, changes no old output. PEGP
(arXiv 2405.13383, eq. 7) asks for x D^T = 0 with the input x of the module in the place of the queries, all heads
together, and leaves value prefixes free: `conditions="paper"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_integer
from forgetcast.tuners.anatomy import Anatomy, Block
from forgetcast.tuners.attention import START, Added, Beside, weight_of
from forgetcast.tuners.base import Conditions, Site
from forgetcast.tuners.placed import Heads, TunedInAttention, expanded, place

PART = "prefix"


class PrefixPart(Added):
    """Keys and values of one attention module."""

    def __init__(self, length: int, heads: Heads, gated: bool) -> None:
        super().__init__(heads.keys, heads.width, gated)
        self.inputs = heads.inputs
        self.keys = nn.Embedding(length, heads.keys * heads.width)
        self.values = nn.Embedding(length, heads.keys * heads.width)
        nn.init.normal_(self.keys.weight, std=START)
        nn.init.normal_(self.values.weight, std=START)

    def tokens(self, samples: int) -> tuple[Float[Tensor, "n m k d"], Float[Tensor, "n m k d"]]:
        """Keys and values for each sample."""
        keys, values = expanded(self.keys, samples), expanded(self.values, samples)
        return keys.view(*keys.shape[:2], self.heads, -1), values.view(*values.shape[:2], self.heads, -1)

    def show(self, query: Float[Tensor, "n h l d"], shares: Float[Tensor, "n h l m"]) -> None:
        """Queries and shares, by head."""
        self.tell("queries", lambda: self.by_head(query))
        self.tell("shares", lambda: self.by_head(shares))
        super().show(query, shares)

    def sites(self, name: str, conditions: Conditions) -> tuple[Site, ...]:
        """Keys act on queries, values on shares."""
        names = f"{name}.keys.weight", f"{name}.values.weight"
        length = self.keys.num_embeddings
        if conditions == "corrected":
            keys = Site(
                (names[0],),
                (weight_of(self.keys),),
                self.heads,
                right=self.space(name, "queries", self.width, self.heads),
            )
            values = Site(
                (names[1],), (weight_of(self.values),), self.heads, left=self.space(name, "shares", length, self.heads)
            )
            return (keys, values, *super().sites(name, conditions))
        if self.inputs != self.keys.embedding_dim:
            raise complaint(
                f"inputs of width {self.inputs} for keys of {self.heads} heads of {self.width} at {name}",
                "as many key heads as fill the width",
                "Take conditions='corrected': the paper's do not exist for grouped queries.",
            )
        keys = Site((names[0],), (weight_of(self.keys),), right=self.space(name, "inputs", self.inputs, 1))
        return (keys, Site((names[1],), (weight_of(self.values),)), *super().sites(name, conditions))


@dataclass(frozen=True)
class Prefix:
    """Options of prefix tuning.

    Attributes:
        length: m, keys and values added to each attention module.
        gated: whether a gate for each head, zero at the start, mixes attention with and without them; without it the
            model changes at once, as published.
        layers: which blocks get them; None for all.
    """

    length: int = 10
    gated: bool = True
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        require_integer("length", self.length, least=1)

    def attach(self, model: nn.Module, parts: Anatomy | None = None) -> TunedInAttention:
        """Put prefixes into a model, in place, and freeze all else.

        Args:
            model: a transformer whose attention calls `scaled_dot_product_attention`.
            parts: where its blocks are; found by name if left out (`anatomy`).

        Raises:
            ValueError: a model with a tuner in place; one whose blocks or heads cannot be found.
        """

        def made(block: Block, heads: Heads) -> Beside:  # noqa: ARG001 - every block alike
            return PrefixPart(self.length, heads, self.gated)

        return place(model, self, parts, self.layers, PART, made)
