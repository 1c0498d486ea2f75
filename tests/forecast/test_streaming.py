"""The form in which features are given changes nothing."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import forgetcast as fc
from builders import features, head, labels, relative_error

TRAININGS = {
    "closed form": fc.GradientDescent(learning_rate=0.2, steps=40),
    "simulation": fc.AdamW(learning_rate=0.01, steps=20, batch_size=16),
}
FORMS = ["loader", "list", "function", "generator", "memmap", "numpy", "one row blocks", "reversed view"]


def blocks(phi, y, rows=17):
    return list(zip(phi.split(rows), y.split(rows), strict=True))


def given(form, phi, y, folder):
    if form == "loader":
        return fc.Features(DataLoader(TensorDataset(phi, y), batch_size=13))
    if form == "list":
        return fc.Features(blocks(phi, y))
    if form == "function":
        return fc.Features(lambda: iter(blocks(phi, y)))
    if form == "generator":
        return fc.Features(block for block in blocks(phi, y))
    if form == "memmap":
        path = folder / f"{len(phi)}.phi"
        phi.numpy().tofile(path)
        return fc.Features(np.memmap(path, np.float64, mode="r", shape=tuple(phi.shape)), y.numpy(), block_rows=11)
    if form == "numpy":
        return fc.Features(phi.numpy(), y.numpy(), block_rows=10_000)
    if form == "reversed view":
        return fc.Features(phi.flip(0).numpy()[::-1], y.flip(0).numpy()[::-1])
    return fc.Features(phi, y, block_rows=1)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_forecast(form, training, tmp_path):
    old, new = (features(60, 9, seed=1), labels(60, 0, 4)), (features(50, 9), labels(50, 2, 4))
    start = head(9, 4)
    plain = fc.forecast_linear(fc.Features(*old), fc.Features(*new), start, TRAININGS[training])
    other = fc.forecast_linear(given(form, *old, tmp_path), given(form, *new, tmp_path), start, TRAININGS[training])
    assert relative_error(other.drift, plain.drift) <= 1e-12
    assert relative_error(other.logits_before, plain.logits_before) <= 1e-12
    assert other.accuracy == plain.accuracy
    assert relative_error(other.modes(5).energy, plain.modes(5).energy) <= 1e-12
    assert other.vulnerable_rank(0.9) == pytest.approx(plain.vulnerable_rank(0.9)) or (
        other.vulnerable_rank(0.9).sample_modes == plain.vulnerable_rank(0.9).sample_modes
    )
    paths = [forecast.at(steps=[1, 30]) for forecast in (plain, other)]
    assert relative_error(paths[1].mean_squared_drift, paths[0].mean_squared_drift) <= 1e-12
    if form != "generator":
        assert paths[1].accuracy.tolist() == paths[0].accuracy.tolist()


def test_an_exhausted_generator_says_so():
    old, new = features(60, 9, seed=1), fc.Features(features(50, 9), labels(50, 0, 4))
    stream = fc.Features((block for block in blocks(old, labels(60, 0, 4))), name="old")
    forecast = fc.forecast_linear(stream, new, head(9, 4), TRAININGS["closed form"])
    for again in (lambda: forecast.at(steps=[1]).accuracy, lambda: forecast.sample_modes(2)):
        with pytest.raises(
            ValueError, match=r"old: a generator .* read already; expected .* read again. Give the func"
        ):
            again()


def test_ill_conditioned_blocks_in_double_precision_stay_double():
    """A stream of float64 keeps the eigenvalues that a float32 product would have to call noise."""
    phi, y = features(50, 9, decay=6.0), labels(50, 0, 4)
    training = fc.GradientDescent(learning_rate=0.2, steps=10**9)
    old = fc.Features(features(20, 9, seed=1))
    plain = fc.forecast_linear(old, fc.Features(phi, y), head(9, 4), training)
    stream = fc.Features(DataLoader(TensorDataset(phi, y), batch_size=13))
    assert relative_error(fc.forecast_linear(old, stream, head(9, 4), training).drift, plain.drift) <= 1e-5


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stream", [False, True])
def test_half_precision_is_computed_in_single(kind, stream):
    (old, new), y = (features(40, 9, seed=s).to(kind) for s in (1, 2)), labels(40, 0, 4)
    start = head(9, 4, dtype=torch.float32)

    def forecast(old, new):
        return fc.forecast_linear(old, new, start, TRAININGS["closed form"]).drift

    truth = forecast(fc.Features(old.float()), fc.Features(new.float(), y))
    if stream:
        half = forecast(fc.Features([(old, None)]), fc.Features([(new, y)]))
    else:
        half = forecast(fc.Features(old), fc.Features(new, y))
    assert half.dtype == torch.float32
    assert relative_error(half, truth) <= 1e-6
