"""Steps that leave the spread of rows, within the space they are projected to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.protect.spread import keeping_spread


def projector(size: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    basis = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=draw)).Q
    return torch.eye(size, dtype=torch.float64) - basis @ basis.T


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(-1, keepdim=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 20), st.booleans())
def test_spreads_stay_and_the_step_stays_in_its_space(seed, taken_left, taken_right, mean_free):
    draw = torch.Generator().manual_seed(seed)
    left, right = projector(8, taken_left, draw), projector(32, taken_right, draw)
    before = torch.randn(1, 8, 32, dtype=torch.float64, generator=draw)
    update = left @ (0.05 * torch.randn(1, 8, 32, dtype=torch.float64, generator=draw)) @ right
    kept = centred if mean_free else (lambda rows: rows)
    found = keeping_spread(before, update, kept, lambda rows: left @ rows, lambda rows: rows @ right)
    norms, after = (kept(matrix).norm(dim=-1) for matrix in (before, before + found))
    assert torch.allclose(norms, after, rtol=1e-11)
    assert torch.allclose(left @ found @ right, found, atol=1e-12)
    assert float((found - update).norm()) < 0.5 * float(update.norm())
    assert float((kept(before + update).norm(dim=-1) - norms).abs().max()) > 1e-6


def test_rows_stand_still_where_no_step_can_keep_their_spread():
    before = torch.ones(1, 1, 2)
    update = torch.tensor([[[0.0, 3.0]]])
    found = keeping_spread(
        before, update, lambda rows: rows, lambda rows: rows, lambda rows: rows * torch.tensor([0.0, 1.0])
    )
    assert found.dtype == torch.float32
    assert abs(float((before + found).norm()) - 2**0.5) < 1e-6
    with pytest.warns(UserWarning, match="they stand still"):
        none = keeping_spread(before, update, lambda rows: rows, lambda rows: 0 * rows, lambda rows: rows)
    assert torch.equal(none, torch.zeros(1, 1, 2))


def test_a_token_without_spread_holds_up_no_other():
    before = torch.cat([torch.zeros(1, 1, 4), torch.ones(1, 1, 4)], 1)
    update = torch.zeros(1, 2, 4)
    update[0, :, 2:] = 0.1
    free = torch.tensor([0.0, 0.0, 1.0, 1.0])
    found = keeping_spread(before, update, lambda rows: rows, lambda rows: rows, lambda rows: rows * free)
    assert torch.allclose(found[0, 0], update[0, 0])
    assert float((before + found)[0, 1].norm()) == pytest.approx(2.0)
    turned = keeping_spread(
        before,
        update * torch.tensor([1.0, 1.0, 1.0, -1.0]),
        lambda rows: rows,
        lambda rows: rows,
        lambda rows: rows * free,
    )
    assert float(turned[0, 1].norm()) > 0.1


def test_a_token_that_may_not_move_holds_up_no_other():
    """All old attention goes to the first of two tokens, so that nothing is free on its left side."""
    draw = torch.Generator().manual_seed(0)
    before, update = torch.randn(2, 1, 2, 6, dtype=torch.float64, generator=draw)
    free = torch.tensor([0.0, 1.0], dtype=torch.float64).diag()
    update = 0.1 * free @ update
    found = keeping_spread(before, update, centred, lambda rows: free @ rows, lambda rows: rows)
    assert not found[0, 0].any()
    assert torch.allclose(centred(before).norm(dim=-1), centred(before + found).norm(dim=-1), rtol=1e-11)
    assert 0 < float((found - update).norm()) < float(update.norm())
