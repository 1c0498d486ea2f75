"""Texts that are cut to the longest of their chunk: every chunk has tokens of its own, and no sample is looped for."""

import pytest
import torch
from torch import nn
from zoo import Function

from builders import dense_jacobian, relative_error
from forgetcast.tangent import gram
from forgetcast.tangent.jacobian import jacobian, trainable
from forgetcast.tangent.kernel import tangent_kernel, trace_kernel
from forgetcast.tangent.planner import LayerPlan

WORDS, WIDTH = 11, 6
LENGTHS = (2, 3, 5, 4, 7, 1, 3, 2)  # the survey's two are not the longest, and chunks differ


def cut(x):
    return x[:, : int((x > 0).sum(1).max())]


def reader() -> nn.Module:
    def forward(self, x):
        x = cut(x)
        mask = (x > 0)[:, :, None].to(self.head.weight)
        h = self.norm(self.embedding(x))
        if self.backwards:
            h = h.transpose(0, 1)
        h = h + torch.tanh(self.inner(h))
        if self.backwards:
            h = h.transpose(0, 1)
        return self.head((h * mask).sum(1) / mask.sum(1))

    embedding = nn.Embedding(WORDS, WIDTH, padding_idx=0)
    model = Function(
        forward, embedding=embedding, norm=nn.LayerNorm(WIDTH), inner=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, 3)
    )
    model.backwards = False
    return model


def texts(lengths=LENGTHS) -> torch.Tensor:
    words = torch.randint(1, WORDS, (len(lengths), max(LENGTHS)))
    return words * (torch.arange(max(LENGTHS)) < torch.tensor(lengths)[:, None])


def seen_by(model: nn.Module) -> list[int]:
    found: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: found.append(len(inputs[0])))
    return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
@pytest.mark.parametrize("backwards", [False, True], ids=["samples first", "samples second"])
def test_jacobian_without_a_loop(backwards, chunk):
    torch.manual_seed(0)
    model, x = reader().double(), texts()
    model.backwards = backwards
    parameters = trainable(model)
    truth = dense_jacobian(model, x, parameters)[0]
    seen = seen_by(model)
    found = jacobian(model, x, parameters, chunk=chunk)
    assert relative_error(found, truth) < 1e-12
    assert seen == [2, 1, *(len(part) for part in torch.split(x, chunk))]  # the survey, then every sample once


@pytest.mark.parametrize("form", ["gram", "explicit"])
@pytest.mark.parametrize("chunk", [2, 3])
def test_kernels_of_two_sets(form, chunk, monkeypatch):
    """Also with the factors kept, whose tokens have to be brought to one length."""
    torch.manual_seed(0)
    model, a, b = reader().double(), texts(), texts((1, 2, 6))
    parameters = trainable(model)
    left, right = (dense_jacobian(model, x, parameters)[0] for x in (a, b))
    collect = gram.collect

    def forced(work, plan):
        for name, layer in plan.layers.items():
            has = work.survey.sizes[name].inputs is not None
            plan.layers[name] = LayerPlan(layer.parameters, form if has else "explicit", "factors", 0.0, 0.0)
        return collect(work, plan)

    monkeypatch.setattr("forgetcast.tangent.kernel.collect", forced)
    found = tangent_kernel(model, a, b, parameters=parameters, chunk=chunk)
    for block, (x, y) in zip(
        (found.aa, found.ab, found.bb), ((left, left), (left, right), (right, right)), strict=True
    ):
        assert relative_error(block, torch.einsum("icp,jdp->icjd", x, y)) < 1e-12
    trace = trace_kernel(model, a, b, parameters=parameters, chunk=chunk)
    assert relative_error(trace.ab, torch.einsum("icp,jcp->ij", left, right) / 3) < 1e-12


@pytest.mark.parametrize("deaf", [4, 6], ids=["the longest has no gradient", "another has none"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["all by the rule", "one chunk goes another way"])
def test_kernel_where_a_chunk_has_no_gradient(deaf, elsewhere):
    """Word 1 is not listened to; where word 2 is, the layer is used once more."""

    def forward(self, x):
        x = cut(x)
        answer = torch.tanh(self.inner(self.embedding(x)))
        if bool((x == 2).any()):
            answer = torch.where((x == 2).any(1)[:, None, None], answer + self.inner(answer), answer)
        return self.head((answer * (x > 1)[:, :, None]).sum(1))

    torch.manual_seed(0)
    x = texts()
    x[x == 2] = 3
    x[deaf][x[deaf] > 0] = 1
    if elsewhere:
        x[-1, 0] = 2
    model = Function(
        forward, embedding=nn.Embedding(WORDS, WIDTH), inner=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, 3)
    ).double()
    model.embedding.requires_grad_(False)
    parameters = trainable(model)
    J = dense_jacobian(model, x, parameters)[0]
    for chunk in (1, 3):
        found = tangent_kernel(model, x, parameters=parameters, chunk=chunk)
        assert relative_error(found.aa, torch.einsum("icp,jdp->icjd", J, J)) < 1e-12
