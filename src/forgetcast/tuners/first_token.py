"""The last feed-forward network for the first token alone, where nothing else of the last block is read.

A model whose feature is its class token reads one row of what its last block makes; attention has mixed the tokens
before. So the largest part of that block can leave the others out, in every pass, forward and backward.
"""

import torch
from torch import Tensor, nn

from forgetcast.tuners.anatomy import Anatomy
from forgetcast.tuners.stream import Pass, Stream


class FirstToken(Pass):
    """A pass whose last feed-forward network reads the first token alone; the other rows end as no model has them.

    Args:
        inner: the pass.
        last: number of the last block.
    """

    def __init__(self, inner: Pass, last: int) -> None:
        self.inner, self.last = inner, last

    def enter(self, block: int, stream: Tensor) -> Tensor:
        """In the last block the first row of what the inner pass gives."""
        given = self.inner.enter(block, stream)
        return given[:, :1] if block == self.last else given

    def leave(self, block: int, found: Tensor) -> Tensor:
        """Added to every row of the stream, of which the first counts."""
        left = self.inner.leave(block, found)
        return left[:, :1] if block == self.last else left

    def behind(self, block: int, stream: Tensor) -> Tensor:
        """As the inner pass has it."""
        return self.inner.behind(block, stream)


def reads_first_token_alone(backbone: nn.Module, parts: Anatomy, inputs: Tensor) -> bool:
    """Whether features depend on the first token alone of what the last feed-forward network makes.

    Answered by a pass in which its other rows are NaN.

    Args:
        backbone: maps inputs to features.
        parts: where its blocks are.
        inputs: at least one.

    Cost: two forward passes.
    """
    last = len(parts.blocks) - 1

    class Blank(Pass):
        def leave(self, block: int, found: Tensor) -> Tensor:
            if block < last:
                return found
            return torch.cat([found[:, :1], torch.full_like(found[:, 1:], torch.nan)], 1)

    stream = Stream(backbone, parts)
    try:
        with torch.no_grad():
            whole: Tensor = backbone(inputs)
            with stream.along(Blank()):
                return torch.equal(whole, backbone(inputs))
    finally:
        stream.remove()
