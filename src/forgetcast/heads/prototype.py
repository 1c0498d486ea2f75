"""The nearest class mean."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from forgetcast.checks import complaint, require_choice, require_finite
from forgetcast.heads.base import StreamedHead


class Prototype(StreamedHead):
    r"""Class means as prototypes, exact whatever the order of samples.

        mu_c = sum_{i: y_i = c} phi_i / n_c
        euclidean:  f_c(phi) = -|phi - mu_c|^2          cosine:  f_c(phi) = <phi, mu_c> / (|phi| |mu_c|)

    Cost: n d to observe, n d C to classify; memory C d.

    Args:
        width: d.
        outputs: C at the start.
        metric: "cosine" or "euclidean".

    Source: Mensink et al., TPAMI 2013 (nearest class mean); Zhou et al., arXiv 2303.07338 (SimpleCIL: cosine).
    """

    by_output = ("counts", "sums")
    sums: Float[Tensor, "C d"]

    def __init__(self, width: int, outputs: int = 0, *, metric: str = "cosine") -> None:
        super().__init__(width, outputs)
        require_choice("metric", metric, ("cosine", "euclidean"))
        self.metric = metric
        self.register_buffer("sums", torch.zeros(outputs, width, dtype=torch.float64))

    @property
    def means(self) -> Float[Tensor, "C d"]:
        """Class means (C, d); zero for an output without a sample."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    def move(self, which: Bool[Tensor, " C"], moves: Float[Tensor, "m d"]) -> None:
        """`mu_c <- mu_c + move_c` for some classes, as if each of their samples had moved by as much.

        Args:
            which: the m classes.
            moves: (m, d), one row for each.

        Raises:
            ValueError: moves of another shape, or not finite.
        """
        expected = (int(which.sum()), self.width)
        if tuple(moves.shape) != expected:
            raise complaint(
                f"moves of shape {tuple(moves.shape)}", f"{expected}: a row a class", "Give one move for each class."
            )
        require_finite("moves", moves)
        self.sums[which] += self.counts[which, None] * moves.to(self.sums)

    def absorb(self, phi: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Add to the class sums."""
        self.sums.index_add_(0, labels, phi)

    def scores(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Minus squared distance, or cosine."""
        means = self.means
        if self.metric == "cosine":
            return normalize(phi) @ normalize(means).T
        return 2 * phi @ means.T - means.square().sum(1) - phi.square().sum(1, keepdim=True)
