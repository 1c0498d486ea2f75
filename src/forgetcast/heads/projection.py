"""Random features: a fixed expansion that makes classes linearly separable."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_integer


class RandomProjection(nn.Module):
    r"""`relu(phi W)` with W (d, size) of independent standard normal entries, drawn once from the seed.

    Put it behind a backbone, `nn.Sequential(backbone, RandomProjection(...))`: its output is what the head sees.
    Half-precision features are projected in float32.

    Args:
        width: d, features coming in.
        size: features going out.
        seed: of W.

    Cost: n d size multiply-adds. Source: RanPAC, McDonnell et al., NeurIPS 2023 (arXiv 2307.02251), section 4.
    """

    matrix: Float[Tensor, "d size"]

    def __init__(self, width: int, size: int, seed: int) -> None:
        super().__init__()
        require_integer("width", width, least=1)
        require_integer("size", size, least=1)
        require_integer("seed", seed)
        self.register_buffer("matrix", torch.randn(width, size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n size"]:
        """Projected features (n, size), non-negative.

        Raises:
            ValueError: features of another width.
        """
        if phi.shape[1] != len(self.matrix):
            raise complaint(
                f"features of shape {tuple(phi.shape)} for a projection of width {len(self.matrix)}",
                f"(n, {len(self.matrix)})",
                "Build the projection with the width of the backbone's features.",
            )
        kind = torch.promote_types(phi.dtype, self.matrix.dtype)
        return torch.relu(phi.to(kind) @ self.matrix.to(kind))
