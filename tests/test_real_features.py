"""CIFAR-100 through a pretrained ViT-Tiny: the forecast on real features, where that data is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import forgetcast as fc
from builders import train

FOLDER = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
ARCHIVE = FOLDER / "cifar100_deit_tiny_int8.npz"


@pytest.fixture(scope="module")
def cifar():
    """Features of the first 20 classes, as two tasks of 10: training and test."""
    if not ARCHIVE.is_file():
        pytest.skip(f"no {ARCHIVE.name}: set FORGETCAST_DATA to a folder with frozen CIFAR-100 features")
    with np.load(ARCHIVE) as archive:
        parts = [
            (archive[f"f_{part}"].astype(np.float32) / 32, archive[f"y_{part}"].astype(int))
            for part in ("train", "test")
        ]
    tasks = [range(10), range(10, 20)]
    return [[(phi[np.isin(y, own)], y[np.isin(y, own)]) for phi, y in parts] for own in tasks]


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_forecast_on_real_features_is_what_happens(cifar, loss):
    (first, held_out), (second, _) = cifar
    start = fc.LinearHead.zeros(192, 20)
    rate = 0.2 if loss == "squared" else 0.03
    training = fc.GradientDescent(learning_rate=rate, steps=60, momentum=0.9, loss=loss)
    head = train(torch.from_numpy(first[0]), torch.from_numpy(first[1]), start, training)
    forecast = fc.forecast_linear(fc.Features(*held_out), fc.Features(*second), head, training)
    after = train(torch.from_numpy(second[0]), torch.from_numpy(second[1]), head, training)
    calibration = forecast.compare(after.logits(torch.from_numpy(held_out[0])))
    assert calibration.one_minus_cosine <= 1e-6
    assert calibration.accuracy_error == pytest.approx(0, abs=0.002)
    assert forecast.accuracy_before > 0.6
    assert forecast.accuracy < forecast.accuracy_before - 0.2
    assert forecast.vulnerable_rank(0.9).sample_modes < 193 / 4
