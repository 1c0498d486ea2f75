"""The Kronecker form against the dense Fisher where it is exact, and against its definition where it is not."""

import pytest
import torch
from torch import nn

from forgetcast.methods.base import Model
from forgetcast.protect.kronecker import KroneckerPenalty
from protect.models import assert_plain, jacobian, moved, small_model, small_task


def test_exact_for_one_linear_layer_with_squared_loss():
    model = small_model(hidden=0)
    whole, task = small_task()
    penalty = KroneckerPenalty(3.0, likelihood="gaussian")
    penalty.end_task(model, task)
    J = jacobian(model, whole.inputs)
    F = torch.einsum("ncp,ncq->pq", J, J) / len(J)
    step = torch.cat([s.flatten() for s in moved(model).values()])
    value = penalty.loss(model, whole, model(whole.inputs))
    torch.testing.assert_close(value, 1.5 * step @ F @ step)


@pytest.mark.parametrize("inplace", [False, True])
def test_factors_of_a_deep_model_are_the_moments_of_inputs_and_output_gradients(inplace):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace))
    model = Model(backbone, nn.Linear(5, 3)).double()
    whole, task = small_task()
    penalty = KroneckerPenalty(1.0)
    penalty.end_task(model, task)
    x = whole.inputs
    p = model(x).detach().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    mask = (backbone[0](x) > 0).double().detach()
    V = mask[:, None, :] * model.head.weight.detach()  # df / d(output of the first layer), (n, C, hidden)
    found = penalty.factors[0]
    torch.testing.assert_close(found["head"]["outputs"], H.mean(0))
    torch.testing.assert_close(found["backbone.0"]["outputs"], torch.einsum("nci,ncd,ndj->ij", V, H, V) / len(x))
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    torch.testing.assert_close(found["backbone.0"]["inputs"], a.T @ a / len(x))


def test_two_tasks_a_grown_head_and_the_state():
    model = small_model(outputs=2)
    whole, task = small_task(classes=(0, 1))
    penalty, other = KroneckerPenalty(2.0), KroneckerPenalty(2.0)
    assert penalty.loss(model, whole, model(whole.inputs)) is None
    penalty.end_task(model, task)
    model.head.grow(3)
    with torch.no_grad():
        model.head.weight[2:] += 5
    assert penalty.loss(model, whole, model(whole.inputs)) == 0
    penalty.end_task(model, small_task(1, seen=(0, 1, 2), index=1)[1])
    assert_plain(penalty.state_dict())
    other.load_state_dict(penalty.state_dict())
    steps = moved(model)
    expected = 0.0
    for factors in penalty.factors:
        for name, pair in factors.items():
            module = model.get_submodule(name)
            D = torch.cat([steps[f"{name}.weight"], steps[f"{name}.bias"][:, None]], 1)[: len(pair["outputs"])]
            assert D.shape[1] == module.weight.shape[1] + 1
            expected += (D.flatten() @ torch.kron(pair["outputs"], pair["inputs"]) @ D.flatten()).item()
    for each in (penalty, other):
        assert each.loss(model, whole, model(whole.inputs)).item() == pytest.approx(expected)


def test_tokens_and_layers_without_bias():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5, bias=False)

        def forward(self, x):
            return self.layer(x).mean(1)

    torch.manual_seed(0)
    model = Model(Pooled(), nn.Linear(5, 3)).double()
    whole, task = small_task(n=6, inputs=8)
    tokens = [type(whole)(b.inputs.reshape(-1, 2, 4), b.labels, b.indices) for b in task.batches()]
    penalty = KroneckerPenalty(1.0)
    penalty.end_task(model, type(task)(0, task.classes, task.seen, lambda: iter(tokens)))
    rows = whole.inputs.reshape(-1, 4)
    torch.testing.assert_close(penalty.factors[0]["backbone.layer"]["inputs"], rows.T @ rows / 12)


def test_hooks_are_gone_and_the_mode_is_back():
    model = small_model().train()
    penalty = KroneckerPenalty(1.0)
    penalty.end_task(model, small_task()[1])
    assert model.backbone[0].training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_linear_layers_is_refused():
    model = small_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="without trainable layers .*; expected at least one"):
        KroneckerPenalty(1.0).end_task(model, small_task()[1])
