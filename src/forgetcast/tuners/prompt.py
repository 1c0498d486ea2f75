"""Prompts: trainable tokens beside those of a transformer's blocks (VPT, arXiv 2203.12119)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from forgetcast.checks import complaint, require_choice, require_integer
from forgetcast.tuners.anatomy import Anatomy, Block, anatomy
from forgetcast.tuners.attention import Beside
from forgetcast.tuners.deep import PromptPart
from forgetcast.tuners.normalisation import understood
from forgetcast.tuners.placed import Heads, TunedInAttention, place
from forgetcast.tuners.shallow import Carried, ShallowPart, carried

PART = "prompt"


@dataclass(frozen=True)
class Prompt:
    """Options of deep prompts.

    Attributes:
        length: m, tokens before each block, or before the first.
        depth: "deep" gives each block tokens of its own, which nothing is made of; "shallow" puts them before the
            first, and the others carry them on, past what projection protects.
        gated: whether a gate for each head, zero at the start, mixes attention with and without them; without it the
            model changes at once, as in VPT.
        normalised: whether the tokens pass the block's normalisation, as in VPT; without it they are what its output
            would be, and projection is exact.
        layers: which blocks get them; None for all. Of shallow ones an unbroken run.
    """

    length: int = 10
    gated: bool = True
    normalised: bool = True
    layers: Sequence[int] | None = None
    depth: Literal["deep", "shallow"] = "deep"

    def __post_init__(self) -> None:
        require_integer("length", self.length, least=1)
        require_choice("depth", self.depth, ("deep", "shallow"))
        if self.depth == "shallow" and not self.normalised:
            raise complaint(
                "shallow prompts with normalised=False",
                "normalised=True: they run through whole blocks",
                "Take depth='deep'.",
            )

    def attach(self, model: nn.Module, parts: Anatomy | None = None) -> TunedInAttention:
        """Put prompts into a model, in place, and freeze all else.

        Args:
            model: a transformer whose attention calls `scaled_dot_product_attention`.
            parts: where its blocks are; found by name if left out (`anatomy`).

        Raises:
            ValueError: a model with a tuner in place; one whose blocks, heads or projections cannot be found; layers
                with gaps between them for shallow prompts.
        """
        parts = anatomy(model) if parts is None else parts
        blocks = parts.layers(self.layers)
        shallow = self.depth == "shallow"
        if shallow and parts.blocks.index(blocks[-1]) - parts.blocks.index(blocks[0]) >= len(blocks):
            raise complaint(f"layers={self.layers} for shallow prompts", "an unbroken run", "Name those between too.")

        def made(block: Block, heads: Heads) -> Beside:
            if shallow and block != blocks[0]:
                return Carried(self.length, heads, self.gated)
            norm = None
            if self.normalised and block.norm:
                module = model.get_submodule(block.norm)
                like = next(model.get_submodule(str(block.attention)).parameters())
                norm = understood(module, heads.inputs, like.detach())
            projection = heads.projection(model, block)
            if shallow:
                return ShallowPart(self.length, heads, self.gated, norm, projection)
            return PromptPart(self.length, heads, self.gated, norm, projection, self.normalised)

        tuned = place(model, self, parts, self.layers, PART, made)
        if shallow:
            modules = [(model.get_submodule(block.name), str(block.attention)) for block in blocks]
            tuned.hooks[modules[0][1]] += carried(model, modules)
        return tuned
