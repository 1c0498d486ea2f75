r"""What a normalisation does to a token: gamma C x / sigma + beta, with C taking off the mean or nothing.

LayerNorm and RMSNorm of every make are this; which, and with what gamma, is found by trying, and anything else refused.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint

EPSILONS = ("eps", "variance_epsilon", "epsilon")
TRIED = 16


@dataclass(frozen=True, eq=False)
class Normalisation:
    """A frozen normalisation, understood.

    Attributes:
        module: as the model has it.
        centres: whether it takes the mean off.
        epsilon: that it adds to the mean square.
    """

    module: nn.Module
    centres: bool
    epsilon: float

    def __call__(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Its output."""
        found: Tensor = self.module(tokens)
        return found

    def centred(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """C x."""
        return rows - rows.mean(-1, keepdim=True) if self.centres else rows

    def spread(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """sigma, by which each token is divided."""
        return (self.centred(tokens).square().mean(-1) + self.epsilon).sqrt()

    def scale(self, like: Float[Tensor, "*n d"]) -> Float[Tensor, " d"]:
        """gamma, from what becomes of a token of signs."""
        signs = torch.ones_like(like[:1])
        signs[:, ::2] = -1
        unit = self.centred(signs) / self.spread(signs)[:, None]
        return ((self(signs) - self(torch.zeros_like(signs))) / unit)[0]


def understood(module: nn.Module, width: int, like: Tensor) -> Normalisation:
    """Find out what a normalisation does.

    Args:
        module: to be tried.
        width: d.
        like: of the type and device of its inputs.

    Raises:
        ValueError: one that is neither a LayerNorm nor an RMSNorm.
    """
    epsilon = next((float(value) for name in EPSILONS if (value := getattr(module, name, None)) is not None), 0.0)
    draw = torch.Generator().manual_seed(0)
    rows = 1 + torch.randn(TRIED, width, generator=draw)
    rows[::2] *= 0.01  # where epsilon counts
    rows = rows.to(like)
    tolerance = 1e-4 if like.dtype.itemsize > 2 else 3e-2  # some compute in single precision whatever they get
    with torch.no_grad():
        for centres in (True, False):
            tried = Normalisation(module, centres, epsilon)
            expected = tried.centred(rows) / tried.spread(rows)[:, None] * tried.scale(rows) + tried(0 * rows)
            found = tried(rows)
            if bool((expected - found).norm() <= tolerance * found.norm()):
                return tried
    raise complaint(
        f"a {type(module).__name__} before attention, which is neither a LayerNorm nor an RMSNorm",
        "one of them",
        "Take Prompt(normalised=False), whose tokens stand behind it, or Prefix.",
    )
