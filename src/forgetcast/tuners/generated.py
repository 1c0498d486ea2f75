r"""Prompts generated from the tokens of each sample, in the stream between attention and feed-forward network.

    P = LN(W x^T)^T + s P'            W (p, t) over places, P (p, d), P' the prompts of the block before

**Read** (the default): every token reads them, through a gate that starts at zero, so that the model computes at first
what it did without, and every parameter trains after one step,

    x <- x + g * softmax(LN(x) P^T / sqrt(d)) P

**Inserted**: they stand behind the class token from the first feed-forward network on, as the released code of NTK-CL
has them. There W, its bias and both parts of LN start at zero, where no gradient reaches any but LN's bias; and the
rows that go on to the next block are those of the old prompts, new ones act through the feed-forward network alone.

Source: arXiv 2407.17120; `Inserted` follows its released code.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from forgetcast.checks import complaint
from forgetcast.tuners.stream import Pass


class Generator(nn.Module):
    """Makes p prompts of t tokens of width d.

    Args:
        tokens: t.
        length: p.
        width: d.
        zero: whether all starts at zero, with a bias over places, as released, instead of orthogonal rows and a plain
            normalisation.
    """

    def __init__(self, tokens: int, length: int, width: int, zero: bool = False) -> None:
        super().__init__()
        self.mix = nn.Linear(tokens, length, bias=zero)  # which the normalisation takes off again
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if zero:
            for value in (*self.mix.parameters(), *self.norm.parameters()):
                nn.init.zeros_(value)
        else:
            nn.init.orthogonal_(self.mix.weight)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n p d"]:
        """The prompts of each sample."""
        if x.shape[1] != self.mix.in_features:
            raise complaint(
                f"{x.shape[1]} tokens a sample",
                f"{self.mix.in_features}, as when the prompts were made",
                "Give images of one size, or a model of its own for each size.",
            )
        prompts: Tensor = self.norm(self.mix(x.mT).mT)
        return prompts


class Gated(Generator):
    """With a gate for each channel, zero at the start."""

    def __init__(self, tokens: int, length: int, width: int) -> None:
        super().__init__(tokens, length, width)
        self.gate = nn.Parameter(torch.zeros(width))


class Read(Pass):
    """Every token reads the prompts of its sample.

    Args:
        parts: one a block.
        scale: s, share of the prompts of the block before.
    """

    def __init__(self, parts: nn.ModuleList, scale: float) -> None:
        self.parts, self.scale = parts, scale
        self.prompts: Tensor | None = None
        self.added: Tensor | None = None

    def enter(self, block: int, stream: Tensor) -> Tensor:
        """The stream with what was read."""
        part = self.parts[block]
        prompts = part(stream)
        if self.prompts is not None:
            prompts = prompts + self.scale * self.prompts
        self.prompts = prompts
        width = stream.shape[-1]
        shares = (layer_norm(stream, (width,)) @ prompts.mT / math.sqrt(width)).softmax(-1)
        self.added = part.gate * (shares @ prompts)
        return stream + self.added

    def leave(self, block: int, found: Tensor) -> Tensor:  # noqa: ARG002
        """What was read goes along the stream too."""
        added, self.added = self.added, None
        assert added is not None
        return found + added


class Inserted(Pass):
    """The prompts stand among the tokens, behind the first.

    Args:
        parts: one a block.
        length: p.
        scale: s, share of the prompts that the block got.
    """

    def __init__(self, parts: nn.ModuleList, length: int, scale: float) -> None:
        self.parts, self.m, self.scale = parts, length, scale
        self.carried = False
        self.first: Tensor | None = None

    def enter(self, block: int, stream: Tensor) -> Tensor:
        """Old prompts out, new ones in."""
        plain = torch.cat([stream[:, :1], stream[:, 1 + self.m :]], 1) if self.carried else stream
        prompts = self.parts[block](plain)
        if self.carried:
            prompts = prompts + self.scale * stream[:, 1 : 1 + self.m]
        return torch.cat([plain[:, :1], prompts, plain[:, 1:]], 1)

    def leave(self, block: int, found: Tensor) -> Tensor:  # noqa: ARG002
        """In the first block the stream has no rows that the prompts' could be added to."""
        if self.carried:
            return found
        self.first = found[:, 1 : 1 + self.m]
        return torch.cat([found[:, :1], found[:, 1 + self.m :]], 1)

    def behind(self, block: int, stream: Tensor) -> Tensor:  # noqa: ARG002
        """From the first block on the prompts go along."""
        first, self.first, self.carried = self.first, None, True
        return stream if first is None else torch.cat([stream[:, :1], first, stream[:, 1:]], 1)


class Added(Pass):
    """What a part makes of the stream is added beside the feed-forward network (adapters).

    Args:
        parts: one a block.
    """

    def __init__(self, parts: nn.ModuleList) -> None:
        self.parts = parts
        self.held: Tensor | None = None

    def enter(self, block: int, stream: Tensor) -> Tensor:
        """The part reads the stream before it is normalised."""
        self.held = self.parts[block](stream)
        return stream

    def leave(self, block: int, found: Tensor) -> Tensor:  # noqa: ARG002
        """Beside the network."""
        held, self.held = self.held, None
        assert held is not None
        return found + held
