"""Closed-form methods on streams of tasks: joint results, independent rows, one reading, resume."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from builders import features, labels
from forgetcast.methods.analytic import ACIL
from forgetcast.methods.base import Batch, TaskData
from forgetcast.methods.fecam import FeCAM
from forgetcast.methods.ncm import NCM, SimpleCIL
from forgetcast.methods.ranpac import RanPAC
from forgetcast.methods.slda import SLDA

WIDTH, OUTPUTS = 10, 6
METHODS = {
    "ncm": NCM,
    "simplecil": SimpleCIL,
    "ranpac": lambda backbone, width: RanPAC(backbone, width, size=50),
    "acil": ACIL,
    "acil_expanded": lambda backbone, width: ACIL(backbone, width, size=30, penalty=0.1),
    "slda": lambda backbone, width: SLDA(backbone, width, shrinkage=0.01),
    "fecam": FeCAM,
    "fecam_shared": lambda backbone, width: FeCAM(backbone, width, shared=True),
}
every_method = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)


def backbone():
    """With batch normalisation and dropout: both tie or blur rows outside evaluation mode."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)).double()
    layers[1].running_mean.normal_()
    layers[0].eval()
    return layers


def task_of(phi, y, index, own, seen, size=16):
    """A task of the classes `own`, and the number of times that it was read."""
    rows = torch.isin(y, torch.tensor(own)).nonzero()[:, 0]
    readings = []

    def batches():
        readings.append(1)
        yield from (Batch(phi[part], y[part], part) for part in rows.split(size))

    return TaskData(index, tuple(own), tuple(sorted(seen)), batches), readings


def learn(method, phi, y, split, size=16):
    seen, readings = set(), []
    for index, own in enumerate(split):
        seen |= set(own)
        task, count = task_of(phi, y, index, own, seen, size)
        method.begin_task(task)
        method.end_task(task)
        readings.append(count)
    assert all(len(count) == 1 for count in readings)
    return method


def samples(seed=0):
    y = labels(180, 0, OUTPUTS, seed)
    return features(180, WIDTH, decay=0.3, seed=seed) + features(OUTPUTS, WIDTH, decay=0, seed=4)[y], y


@every_method
def test_the_order_of_tasks_and_batches_does_not_matter(build):
    phi, y = samples()
    test = features(20, WIDTH, seed=9)
    joint = learn(build(backbone(), WIDTH), phi, y, [range(OUTPUTS)], size=180).predict(test)
    for split in ([(0, 1), (2, 3), (4, 5)], [(4, 5), (0,), (1, 2, 3)]):
        logits = learn(build(backbone(), WIDTH), phi, y, split).predict(test)
        assert torch.allclose(logits, joint, rtol=1e-7, atol=1e-9)


@every_method
def test_rows_do_not_depend_on_each_other(build):
    method = learn(build(backbone(), WIDTH), *samples(), [(0, 1, 2), (3, 4, 5)])
    test = features(20, WIDTH, seed=9)
    together = method.predict(test)
    alone = torch.cat([method.predict(row[None]) for row in test])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(alone, together, rtol=0, atol=1e-6)
    assert torch.allclose(method.predict(test[order]), together[order], rtol=0, atol=1e-6)


@every_method
def test_outputs_are_those_seen_and_no_gradient_remains(build):
    phi, y = samples()
    method = build(backbone(), WIDTH)
    for split, outputs in (([(0, 1)], 2), ([(2, 3, 4)], 5)):
        learn(method, phi, y, split)
        logits = method.predict(phi[:7])
        assert logits.shape == (7, outputs)
        assert not logits.requires_grad
    assert not method.by_gradient
    with pytest.raises(ValueError, match=r"gradient step.*by_gradient"):
        method.loss(Batch(phi[:2], y[:2], torch.arange(2)))


@every_method
def test_backbone_keeps_its_modes_and_its_state_also_on_error(build):
    method, (phi, y) = build(backbone(), WIDTH), samples()
    modes = [module.training for module in method.model.modules()]
    assert {True, False} <= set(modes)
    state = copy.deepcopy(method.model.backbone.state_dict())
    learn(method, phi, y, [(0, 1)])
    method.predict(phi)
    phi[:] = torch.nan
    with pytest.raises(ValueError, match="nan"):
        learn(method, phi, y, [(2, 3)])
    assert [module.training for module in method.model.modules()] == modes
    after = method.model.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())


@every_method
def test_resumed_is_uninterrupted(build):
    phi, y = samples()
    test = features(20, WIDTH, seed=9)
    whole = learn(build(backbone(), WIDTH), phi, y, [(0, 1), (2, 3), (4, 5)])
    first = learn(build(backbone(), WIDTH), phi, y, [(0, 1), (2, 3)])
    second = build(backbone(), WIDTH)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.predict(test), first.predict(test))
    task, _ = task_of(phi, y, 2, (4, 5), range(6))
    second.begin_task(task)
    second.end_task(task)
    assert torch.equal(second.predict(test), whole.predict(test))


def test_ncm_measures_distance_and_simplecil_angle():
    phi, y = samples()
    own_mean = torch.stack([phi[y == c].mean(0) for c in range(OUTPUTS)])
    distances = -torch.cdist(2 * own_mean, own_mean).square()
    cosines = torch.nn.functional.cosine_similarity(own_mean[:, None], own_mean[None], dim=2)
    for build, expected in ((NCM, distances), (SimpleCIL, cosines)):
        method = learn(build(nn.Identity(), WIDTH), phi, y, [(0, 1, 2), (3, 4, 5)])
        assert torch.allclose(method.predict(2 * own_mean), expected, atol=1e-10)


def accuracy(method, phi, y):
    return float((method.predict(phi).argmax(1) == y).double().mean())


def test_on_digits_second_moments_beat_means():
    """Mean over three splits: every method that uses second moments is above NCM, which is above 0.85."""
    digits = load_digits()
    phi, y = torch.from_numpy(digits.data) / 16, torch.from_numpy(digits.target).long()
    builds = {
        "ncm": NCM,
        "ranpac": lambda b, w: RanPAC(b, w, size=300),
        "slda": lambda b, w: SLDA(b, w, shrinkage=0.01),
        "fecam": lambda b, w: FeCAM(b, w, power=0.5),
    }
    mean = dict.fromkeys(builds, 0.0)
    for seed in range(3):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
        train, test = order[:1000], order[1000:]
        split = np.random.default_rng(seed).permutation(10).reshape(5, 2).tolist()
        for name, build in builds.items():
            method = learn(build(nn.Identity(), 64), phi[train], y[train], split, size=100)
            mean[name] += accuracy(method, phi[test], y[test]) / 3
    assert mean["ncm"] > 0.85
    assert min(mean[name] for name in ("ranpac", "slda", "fecam")) > mean["ncm"]


FOLDER = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[3] / "shared" / "data"))
ARCHIVE = FOLDER / "cifar100_deit_tiny_int8.npz"


@pytest.mark.parametrize(("build", "expected"), [(SimpleCIL, 0.55), (SLDA, 0.62)])
def test_cifar_100_on_a_pretrained_vit(build, expected):
    """Ten tasks reach what the joint fit of the same rule reaches, as measured apart from this library."""
    if not ARCHIVE.is_file():
        pytest.skip(f"no {ARCHIVE.name}: set FORGETCAST_DATA to a folder with frozen CIFAR-100 features")
    with np.load(ARCHIVE) as archive:
        phi, y, test, truth = (torch.from_numpy(archive[name]) for name in ("f_train", "y_train", "f_test", "y_test"))
    split = np.arange(100).reshape(10, 10).tolist()
    method = learn(build(nn.Identity(), 192), phi.float(), y.long(), split, size=5000)
    assert accuracy(method, test.float(), truth.long()) == pytest.approx(expected, abs=0.005)
