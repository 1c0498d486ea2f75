"""The spectral regulariser as a protection: all modes is distillation of all outputs; it keeps what it holds."""

import pytest
import torch
from torch import nn

from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Batch, Model, TaskData
from forgetcast.protect.distill import Distillation
from forgetcast.protect.spectral_head import SpectralHead


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(outputs: int, seed: int = 0) -> Model:
    head = Linear(7, outputs)
    with torch.no_grad():
        head.weight.copy_(draw(outputs, 7, seed=seed))
        head.bias.copy_(draw(outputs, seed=seed + 1))
    return Model(nn.Identity(), head)


def task(index: int, inputs: torch.Tensor, seen: tuple[int, ...]) -> TaskData:
    batch = Batch(inputs, torch.zeros(len(inputs), dtype=torch.int64), torch.arange(len(inputs)))
    return TaskData(index, seen, seen, lambda: iter([batch]))


def moved(network: Model, seed: int) -> None:
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.add_(0.1 * draw(*parameter.shape, seed=seed))


@pytest.mark.parametrize("rows", [5, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_modes_is_distillation_of_all_outputs(rows, seed):
    network, old = model(3, seed), draw(rows, 7, seed=seed + 5)
    spectral, distillation = SpectralHead(2.0, modes=100), Distillation(2.0, form="logits")
    for protection in (spectral, distillation):
        protection.begin_task(network, task(0, old, (0, 1, 2)))
        protection.end_task(network, task(0, old, (0, 1, 2)))
        protection.begin_task(network, task(1, old, (0, 1, 2)))
    batch = next(task(1, old, (0, 1, 2)).batches())
    assert spectral.loss(network, batch, network(old)).item() < 1e-9
    moved(network, seed)
    logits = network(old)
    expected = distillation.loss(network, batch, logits) * 3 / 2  # distillation averages over outputs, without a half
    assert torch.allclose(spectral.loss(network, batch, logits), expected, rtol=1e-4)


def test_three_tasks_are_held_together_and_survive_a_checkpoint():
    network, protection = model(2), SpectralHead(1.0, modes=100)
    parts, references = [], []
    for index, outputs in enumerate((2, 4, 5)):
        network.head.grow(outputs)
        data = task(index, draw(20, 7, seed=index), tuple(range(outputs)))
        protection.begin_task(network, data)
        moved(network, index)
        protection.end_task(network, data)
        parts.append(next(data.batches()).inputs)
        references.append(network(parts[-1]).detach())
    network.head.grow(6)
    resumed = SpectralHead(1.0, modes=100)
    resumed.load_state_dict(protection.state_dict())
    assert protection.state_dict()["root"].shape == (8, 8)  # d + 1 rows, however many tasks
    losses = []
    for own in (protection, resumed):
        own.begin_task(network, task(3, parts[0], tuple(range(6))))
        moved(network, 9)
        losses.append(own.loss(network, next(task(3, parts[0], (0,)).batches()), network(parts[0])))
        expected = torch.zeros(())
        for inputs, reference in zip(parts, references, strict=True):
            gap = network(inputs) - nn.functional.pad(reference, (0, 6 - reference.shape[1]))
            expected = expected + gap.square().sum() / (2 * len(inputs))
        # compression moves part of the squared norm into a constant that no gradient sees
        assert torch.allclose(losses[-1] + own.penalty.constant, expected, rtol=1e-4)


def test_no_mode_is_no_penalty_and_no_strength_no_force():
    for protection in (SpectralHead(1.0, modes=0), SpectralHead(0.0, modes=5)):
        network, data = model(3), task(0, draw(9, 7, seed=0), (0, 1, 2))
        protection.begin_task(network, data)
        protection.end_task(network, data)
        moved(network, 1)
        term = protection.loss(network, next(data.batches()), network(draw(9, 7, seed=0)))
        assert term is None or term.item() == 0


def test_only_a_linear_head_on_frozen_features():
    data = task(0, draw(9, 7, seed=0), (0, 1))
    with pytest.raises(ValueError, match="a Cosine on a backbone of which nothing trains"):
        SpectralHead().begin_task(Model(nn.Identity(), Cosine(7, 2)), data)
    with pytest.raises(ValueError, match=r"of which \['weight', 'bias'\] trains"):
        SpectralHead().begin_task(Model(nn.Linear(7, 7), Linear(7, 2)), data)
