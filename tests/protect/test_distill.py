"""Distillation pulls nowhere while the model is its snapshot, and back to it once it has moved."""

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from forgetcast.methods.base import Model
from forgetcast.protect.distill import Distillation
from protect.models import assert_plain, moved, small_model, small_task

FORMS = ["softened", "logits"]


def in_second_task(form, outputs=2):
    model = small_model(outputs=outputs)
    whole, first = small_task(classes=(0, 1))
    whole_second, second = small_task(1, classes=(2,), seen=(0, 1, 2), index=1)
    protection = Distillation(1.5, temperature=2.0, form=form)
    protection.begin_task(model, first)
    assert protection.loss(model, whole, model(whole.inputs)) is None
    protection.end_task(model, first)
    model.head.grow(3)
    protection.begin_task(model, second)
    return model, protection, whole_second


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_zero_at_the_snapshot(form):
    model, protection, batch = in_second_task(form)
    protection.loss(model, batch, model(batch.inputs)).backward()
    for parameter in model.parameters():
        assert parameter.grad.abs().max() < 1e-14
    moved(model)
    protection.loss(model, batch, model(batch.inputs)).backward()
    assert model.backbone[0].weight.grad.abs().max() > 1e-3
    assert (model.head.weight.grad[2:] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_value_follows_the_formula(form):
    model, protection, batch = in_second_task(form)
    old = model(batch.inputs).detach()[:, :2]
    moved(model)
    new = model(batch.inputs)[:, :2]
    value = protection.loss(model, batch, model(batch.inputs))
    if form == "logits":
        expected = 1.5 * (new - old).square().mean()
    else:
        q = (old / 2).softmax(1)
        entropy = -(q * q.log()).sum(1).mean()
        expected = 1.5 * 4 * (kl_div((new / 2).log_softmax(1), q, reduction="batchmean") + entropy)
    torch.testing.assert_close(value, expected)


def test_state_restores_the_snapshot_within_a_task():
    model, protection, batch = in_second_task("softened")
    assert_plain(protection.state_dict())
    other = Distillation(1.5)
    other.load_state_dict(protection.state_dict())
    moved(model)
    logits = model(batch.inputs)
    assert other.loss(model, batch, logits) == protection.loss(model, batch, logits)


def test_the_teacher_neither_drops_out_nor_moves_running_statistics():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = Model(backbone, nn.Linear(4, 3)).double().train()
    model.head.grow = lambda outputs: None
    batch, task = small_task()
    protection = Distillation(form="logits")
    protection.end_task(model, task)
    protection.begin_task(model, task)
    with torch.no_grad():
        kept = backbone[0].running_mean.clone()
        frozen = model.eval()(batch.inputs)
        assert protection.loss(model.train(), batch, frozen) == 0
    assert torch.equal(backbone[0].running_mean, kept)
    assert backbone[1].training


def test_unknown_form_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'logits'"):
        Distillation(form="logit")
