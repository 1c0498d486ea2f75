"""What all heads share: growth, saved states, outputs without samples, bad input."""

import pytest
import torch

from builders import features, labels
from forgetcast.heads.base import UNSEEN
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.discriminant import LinearDiscriminant, Mahalanobis
from forgetcast.heads.linear import Linear
from forgetcast.heads.prototype import Prototype
from forgetcast.heads.ridge import RecursiveRidge
from forgetcast.heads.sectioned import Sectioned

WIDTH = 6
STREAMED = {
    "ncm": lambda outputs=0: Prototype(WIDTH, outputs, metric="euclidean"),
    "cosine": lambda outputs=0: Prototype(WIDTH, outputs, metric="cosine"),
    "sectioned": lambda outputs=0: Sectioned(WIDTH, outputs, weights=(0.3, 0.1)),
    "ridge": lambda outputs=0: RecursiveRidge(WIDTH, outputs, penalty=0.1),
    "ridge_grid": lambda outputs=0: RecursiveRidge(WIDTH, outputs, penalty=(0.01, 1.0, 100.0)),
    "slda": lambda outputs=0: LinearDiscriminant(WIDTH, outputs, shrinkage=0.1, priors=True),
    "fecam": lambda outputs=0: Mahalanobis(WIDTH, outputs),
    "fecam_shared": lambda outputs=0: Mahalanobis(WIDTH, outputs, shared=True),
}


def learnt(build, outputs=3, seed=0):
    head = build(outputs)
    head.observe(features(40, WIDTH, decay=0.3, seed=seed), labels(40, 0, outputs, seed))
    head.solve()
    return head


@pytest.mark.parametrize("build", STREAMED.values(), ids=STREAMED)
class TestStreamed:
    def test_growth_leaves_old_logits_and_never_shrinks(self, build):
        head, phi = learnt(build), features(9, WIDTH, seed=5)
        before = head(phi)
        head.grow(5)
        assert head.outputs == 5
        assert torch.allclose(head(phi)[:, :3], before, rtol=1e-12)
        head.grow(2)
        assert head.outputs == 5

    @pytest.mark.parametrize("start", [0, 4, 9])
    def test_a_state_saved_after_growth_predicts_and_goes_on_alike(self, build, start):
        head, phi = learnt(build), features(9, WIDTH, seed=5)
        head.grow(4)
        twin = build(start)
        twin.load_state_dict(head.state_dict())
        assert torch.equal(twin(phi), head(phi))
        for each in (head, twin):
            each.observe(features(20, WIDTH, seed=7), labels(20, 2, 4, seed=7))
            each.solve()
        assert torch.equal(twin(phi), head(phi))

    def test_an_output_without_samples_never_wins_and_stays_finite(self, build):
        head = learnt(build)
        head.grow(4)
        logits = head(features(9, WIDTH, seed=5))
        assert (logits[:, 3] == UNSEEN).all()
        assert (logits.argmax(1) < 3).all()
        assert torch.isfinite(logits.softmax(1)).all()
        assert torch.isfinite(logits.float()).all()

    def test_bad_input_is_refused(self, build):
        head, phi, y = build(3), features(8, WIDTH), labels(8, 0, 3)
        with pytest.raises(ValueError, match=r"no sample was observed.*Call observe"):
            head.solve()
        with pytest.raises(ValueError, match=r"width 6; expected \(n, 6\)"):
            head.observe(features(8, 5), y)
        with pytest.raises(ValueError, match=r"labels from 0 to 3 for 3 outputs.*Call grow"):
            head.observe(phi, torch.tensor([0, 1, 2, 3, 0, 1, 2, 0]))
        spoilt = phi.clone()
        spoilt[4, 2] = torch.nan
        with pytest.raises(ValueError, match=r"nan at \[4, 2\]"):
            head.observe(spoilt, y)
        assert head.counts.sum() == 0
        head.observe(phi, y)
        with pytest.raises(ValueError, match=r"after the last solve.*Call solve"):
            head(phi)

    def test_sums_cast_below_float64_are_refused(self, build):
        head = build(3).half()
        with pytest.raises(ValueError, match=r"below float64.*backbone"):
            head.observe(features(8, WIDTH), labels(8, 0, 3))

    def test_a_head_without_outputs_gives_no_logits(self, build):
        assert build(0)(features(4, WIDTH)).shape == (4, 0)

    def test_an_empty_batch_changes_nothing(self, build):
        head, phi = learnt(build), features(9, WIDTH, seed=5)
        before = head(phi)
        head.observe(phi[:0], labels(0, 0, 3))
        head.solve()
        assert torch.allclose(head(phi), before, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_keeps_old_rows_and_starts_new_ones_at_zero(bias):
    head = Linear(WIDTH, 2, bias=bias)
    with torch.no_grad():
        head.weight.copy_(features(2, WIDTH))
    phi = features(5, WIDTH, dtype=torch.float32)
    before = head(phi)
    head(phi).sum().backward()
    head.grow(4)
    assert head.weight.requires_grad
    assert torch.allclose(head(phi)[:, :2], before, rtol=1e-5)
    assert not head(phi)[:, 2:].any()
    head(phi).sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in head.parameters())
    twin = Linear(WIDTH, 7, bias=bias)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(phi), head(phi))


def test_cosine_sees_directions_alone_and_trains_its_scale():
    head, phi = Cosine(WIDTH, 2, scale=4.0), features(5, WIDTH, dtype=torch.float32)
    before = head(phi)
    head.grow(3)
    logits = head(phi)
    assert torch.allclose(logits[:, :2], before, rtol=1e-5)
    assert torch.allclose(head(100 * phi), logits, atol=1e-5)
    expected = torch.nn.functional.cosine_similarity(phi[:, None], head.weight[None], dim=2)
    assert torch.allclose(logits, 4 * expected, atol=1e-5)
    logits.square().sum().backward()
    assert head.scale.grad.abs() > 0
    assert head.weight.grad.norm(dim=1).min() > 0
    assert head.weight.grad.abs().max() < 1e3
    twin = Cosine(WIDTH)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(phi), head(phi))


def test_a_state_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Linear(WIDTH, 2).load_state_dict(Linear(WIDTH + 1, 3).state_dict())
