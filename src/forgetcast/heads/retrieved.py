r"""A linear head of several features of each sample: the one answers that its own answers lead to.

    place_0 = owner(argmax_c cos(phi_0, mu_c));      place_{k+1} = owner(argmax_c f_c(phi_{place_k}))

until a place stays. Its answer is then that of an output which it owns: a fixed point.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from forgetcast.heads.base import UNSEEN
from forgetcast.heads.linear import Linear
from forgetcast.heads.prototype import Prototype


def retrieved(
    features: Float[Tensor, "n t d"],
    first: Float[Tensor, "n C"],
    answer: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n C"]],
    owner: Int[Tensor, " C"],
    rounds: int,
) -> tuple[Float[Tensor, "n C"], Int[Tensor, " n"]]:
    """Logits of the feature that each sample comes to, and its place. No label is asked for, and no other sample.

    Args:
        features: of t places.
        first: logits, or anything of their order, whose largest has the first place.
        answer: logits of a feature.
        owner: the place of each output; one of place -1 is no answer.
        rounds: looks at most, at least 1; where places go round in a circle the last look counts.

    Returns:
        Logits, `UNSEEN` for outputs of no place; and places.

    Cost: at most n rounds features through `answer`.
    """
    rows, nobody = torch.arange(len(features), device=features.device), owner < 0
    following = owner[first.masked_fill(nobody, UNSEEN).argmax(1)]
    for _ in range(rounds):
        place = following
        logits = answer(features[rows, place]).masked_fill(nobody, UNSEEN)
        following = owner[logits.argmax(1)]
        if torch.equal(following, place):
            break
    return logits, place


class Retrieved(Linear):
    """A linear head, the class means of the first of t features, and the place of each output among these.

        answer = log[ softmax f(phi_place) + softmax t cos(phi_0, mu) ]

    Args:
        width: d.

    Attributes:
        means: of the first feature.
        owner: (C,) place of each output; -1 for none yet.

    Source: MOS, arXiv 2412.09441; the factor t as in its released code.
    """

    owner: Int[Tensor, " C"]

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.means = Prototype(width)
        self.register_buffer("owner", torch.zeros(0, dtype=torch.int64))
        self.by_output = (*self.by_output, "owner")

    def grow(self, outputs: int) -> None:
        """Grow to `outputs`; new ones have no place."""
        super().grow(outputs)
        self.means.grow(outputs)

    def fresh(self, name: str, like: Tensor) -> Tensor:
        """New rows: zero, and no place."""
        return torch.full_like(like, -1) if name == "owner" else super().fresh(name, like)

    def observe(
        self, first: Float[Tensor, "n d"], labels: Int[Tensor, " n"], outputs: Sequence[int], place: int
    ) -> None:
        """Take in the first features of samples, and give outputs to a place."""
        self.means.observe(first, labels)
        self.means.solve()
        self.owner[list(outputs)] = place

    def answer(self, features: Float[Tensor, "n t d"], rounds: int) -> Float[Tensor, "n C"]:
        """Logarithms of both probabilities' sum, for outputs of a place; `UNSEEN` for others, and where t = 0."""
        if not features.shape[1]:
            return features.new_full((len(features), self.outputs), UNSEEN)
        first = self.means(features[:, 0])
        found, _ = retrieved(features, first, self, self.owner, rounds)
        both = torch.logaddexp(found.log_softmax(1), (features.shape[1] * first).log_softmax(1).to(found))
        return both.masked_fill(self.owner < 0, UNSEEN)
