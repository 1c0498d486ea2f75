r"""Steps under which the norms of rows stay as well: tokens that pass a normalisation.

LayerNorm divides a token by its spread: a step D changes what follows by gamma D / sigma, which a projection can
forbid, and by a change of sigma, which it cannot: that is quadratic in D. Here the projected step is corrected within
its own space until the norm of each row is what it was:

    D <- D + P_left diag(a) X P_right,    X = centred (M + D),    2 (P_left * (X P_right X^T)) a = |M|^2 - |X|^2 by rows

which is Newton's method for a, with one m x m system a turn. NSP^2 (NeurIPS 2024, eq. 27) adds a penalty to the loss
instead, which keeps spreads nearly.
"""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

TURNS = 20
CLOSE = 1e-12
"""Relative error of a squared norm that is called kept."""
RIDGE = 1e-10
"""Share of the mean slope that is added to it: where few directions are free it is singular."""
Side = Callable[[Tensor], Tensor]


def keeping_spread(
    before: Float[Tensor, "k m d"], update: Float[Tensor, "k m d"], centred: Side, left: Side, right: Side
) -> Float[Tensor, "k m d"]:
    """An update near a projected one, in the same space, that leaves the norm of each centred row.

    Args:
        before: the matrix.
        update: projected from both sides.
        centred: takes off each row what the normalisation does; linear, and a projection.
        left: the projection of columns, (k, m, c) -> (k, m, c).
        right: the projection of rows.

    Returns:
        The update; zeros, with a warning, if there is none near: the rows stand still. Rows without spread have none
        to keep.

    Cost: m^2 d + m^3 flops a turn, four turns or so.
    """
    old, found = centred(before.double()), update.double()
    norms = old.square().sum(-1)
    held = norms > 0
    eye = torch.eye(old.shape[1], dtype=old.dtype, device=old.device).expand(len(old), -1, -1)
    allowed = left(eye)
    for _ in range(TURNS):
        rows = centred(before.double() + found)
        missing = torch.where(held, norms - rows.square().sum(-1), 0.0)
        if bool((missing.abs() <= CLOSE * norms).all()):
            return found.to(update)
        free = right(rows)
        slope = torch.where(held[:, :, None] & held[:, None], 2 * allowed * (rows @ free.mT), eye * ~held[:, :, None])
        ridge = RIDGE * slope.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        turn = torch.linalg.solve_ex(slope + ridge * eye, missing[..., None]).result
        found = found + left(turn * free)
    warnings.warn(
        "No step near a projected one keeps the spread of all tokens: they stand still. A smaller learning rate helps.",
        stacklevel=2,
    )
    return torch.zeros_like(update)
