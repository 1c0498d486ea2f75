"""Bad input is refused before anything is computed: what was given, what was expected, what to do."""

import math
import re

import numpy as np
import pytest
import torch

import forgetcast as fc
from builders import features, head, labels

PHI, Y = features(40, 6), labels(40, 0, 3)
DESCENT = {"learning_rate": 0.1, "steps": 5}
TRAINING = fc.GradientDescent(**DESCENT)


def refused(given: str, remedy: str):
    return pytest.raises(ValueError, match=f"(?s){given}.*; expected .*{remedy}")


class Recorder:
    """An old stream that remembers whether it was read."""

    def __init__(self):
        self.read = False

    def __call__(self):
        self.read = True
        yield PHI, Y


def forecast(new, start=None, training=TRAINING):
    """A forecast that must fail before the old features are looked at."""
    recorder = Recorder()
    try:
        return fc.forecast_linear(fc.Features(recorder), new, start or head(6, 3), training)
    except ValueError:
        assert not recorder.read
        raise


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    phi = PHI.clone()
    phi[31, 4] = bad
    with refused(rf"old: features of shape \(40, 6\) holds {bad} at \[31, 4\]", "Remove or repair"):
        fc.Features(phi, Y, name="old")
    with refused(rf"holds {bad} at \[31, 4\]", "Remove or repair"):  # deep in a stream, counted from its start
        forecast(fc.Features(list(zip(phi.split(10), Y.split(10), strict=True))))
    with refused(rf"targets of shape .* holds {bad} at \[31, 4\]", "Remove or repair"):
        fc.Features(PHI, phi)
    with refused(f"head weight .* holds {bad}", "Remove or repair"):
        fc.LinearHead(phi)


@pytest.mark.parametrize("label", [-1, 3, 700])
@pytest.mark.parametrize("stream", [False, True])
def test_label_out_of_range(label, stream):
    y = Y.clone()
    y[37] = label
    new = fc.Features(list(zip(PHI.split(8), y.split(8), strict=True)) if stream else PHI, None if stream else y)
    with refused(f"label {label} for a head of 3 outputs", "Grow the head"):
        forecast(new)


def test_widths_that_do_not_match():
    with refused(r"new: features of shape \(40, 6\) for a head weight of shape \(7, 3\)", "Use the features"):
        forecast(fc.Features(PHI, Y, name="new"), head(7, 3))
    with refused(r"old: features of shape \(40, 5\) for a head weight of shape \(6, 3\)", "transposed"):
        fc.forecast_linear(fc.Features(PHI[:, :5], name="old"), fc.Features(PHI, Y), head(6, 3), TRAINING)
    with refused(r"\(20, 5\) after blocks of width 6", "Use one backbone"):
        forecast(fc.Features([(PHI[:20], Y[:20]), (PHI[20:, :5], Y[20:])]))
    with refused(r"features of shape \(40, 6\) for a head weight of shape \(7, 3\)", "Use the features"):
        forecast(fc.Features([(PHI, Y)]), head(7, 3))
    with refused(r"features of shape \(40, 6\) for a head weight of shape \(5, 3\)", "Use the features"):
        forecast(fc.Features([(PHI, Y)]), head(5, 3))  # as wide as the weight with its bias row


def test_bias_of_another_shape():
    with refused(r"a head bias of shape \(6,\) .* weight of shape \(6, 3\)", "Transpose the weight"):
        fc.LinearHead(torch.zeros(6, 3), torch.zeros(6))


@pytest.mark.parametrize("shape", [(0, 6), (5, 0)])
def test_empty_task(shape):
    with refused("no samples", "Drop the empty task"):
        fc.Features(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    with refused("no samples", "Drop the empty task"):
        forecast(fc.Features([]))


@pytest.mark.parametrize("phi", [np.ones((4, 2), int), torch.ones(4, 2) > 0, np.ones((4, 2, 2)), np.ones(4)])
def test_features_of_another_kind(phi):
    with refused("features of shape .* and type torch", "convert"):
        fc.Features(phi, np.zeros(4, int))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_labels_of_another_type(kind):
    with refused(f"labels of type {kind}", "Convert labels"):
        fc.Features(PHI, Y.to(kind))


def test_targets_of_another_shape():
    with refused(r"targets of shape \(39,\) for features of shape \(40, 6\)", "one target a sample"):
        fc.Features(PHI, Y[:39])
    with refused(r"targets of shape \(40, 2\) for a head of 3 outputs", "Grow the head"):
        forecast(fc.Features(PHI, torch.zeros(40, 2).double()))
    with refused(r"targets of shape \(40, 3\) and type torch.int64", "Convert"):
        fc.Features(PHI, torch.zeros(40, 3, dtype=torch.int64))
    with refused("no targets", "Give y"):
        forecast(fc.Features(PHI))
    with refused("a block without targets after blocks with", "targets are not known"):
        forecast(fc.Features([(PHI, Y), (PHI, None)]))


def test_streams_of_another_kind():
    with refused("got targets of type Tensor beside a stream of type list", "yield the targets"):
        fc.Features([(PHI, Y)], Y)
    with refused("got int", "Extract the features"):
        fc.Features(3)
    with refused("the stream yielded a Tensor", "Yield"):
        forecast(fc.Features([PHI]))


@pytest.mark.parametrize("stream", [False, True])
def test_zero_variance(stream):
    phi, y = torch.ones(100, 6).double(), torch.zeros(100).long()
    with refused("all 100 samples have equal features", "Check the backbone"):
        forecast(fc.Features([(phi[:50], y[:50]), (phi[50:], y[50:])]) if stream else fc.Features(phi, y))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("rows", [40, 4])
def test_unstable_learning_rate(momentum, nesterov, rows):
    """The rate that the message names is the limit indeed: just below stays bounded, just above diverges."""
    new, start = fc.Features(PHI[:rows], Y[:rows]), head(6, 3)

    def descent(rate, steps=5):
        return fc.GradientDescent(learning_rate=rate, steps=steps, momentum=momentum, nesterov=nesterov)

    with refused("got learning_rate=1e\\+06 where .* curvature", "Set learning_rate below") as caught:
        forecast(new, start, descent(1e6))
    limit = float(re.search(r"at most ([\d.e+]+),", str(caught.value))[1])

    def size(share):
        spectrum = forecast(new, start).new_spectrum
        steepest = spectrum.values[:1] * 2 / (rows * 3)
        return abs(float(descent(share * limit, 3000).filter(steepest, 3000))) * float(steepest)

    below = forecast(new, start, descent(0.999 * limit, 3000))
    assert float(below.drift.abs().max()) < 1e3
    assert size(0.999) < 10
    assert size(1.01) > 1e3


def test_empty_schedule_of_no_steps():
    assert not forecast(fc.Features(PHI, Y), training=fc.GradientDescent(learning_rate=[], steps=0)).drift.any()


@pytest.mark.parametrize("kind", [fc.GradientDescent, fc.SGD, fc.AdamW])
@pytest.mark.parametrize(
    ("bad", "given", "remedy"),
    [
        ({"loss": "cross-entropy"}, "got loss='cross-entropy'", "Did you mean 'cross_entropy'"),
        ({"loss": "hinge!"}, "got loss='hinge!'", "Choose one of"),
        ({"reduction": "men"}, "got reduction='men'", "Did you mean 'mean'"),
        ({"learning_rate": -0.1}, "got learning_rate=-0.1", "Correct learning_rate"),
        ({"learning_rate": math.nan}, "got learning_rate=nan", "Correct learning_rate"),
        ({"learning_rate": 0.0}, "got learning_rate=0.0", "Correct learning_rate"),
        ({"learning_rate": [0.1] * 4}, "a schedule of 4 learning rates for 5 steps", "Give a single number"),
        ({"learning_rate": [0.1] * 4 + [-1.0]}, r"got learning_rate\[4\]=-1.0", "Correct"),
        ({"steps": -1}, "got steps=-1", "Correct steps"),
        ({"steps": 2.5}, "got steps=2.5", "Correct steps"),
        ({"weight_decay": -1.0}, "got weight_decay=-1.0", "Correct weight_decay"),
        ({"drift_penalty": -1.0}, "got drift_penalty=-1.0", "Correct drift_penalty"),
        ({"classes": (0, 0)}, r"got classes=\(0, 0\)", "Leave classes=None"),
        ({"classes": ()}, r"got classes=\(\)", "Leave classes=None"),
        ({"classes": (-1,)}, "got classes=-1", "Correct classes"),
    ],
)
def test_training_out_of_range(unchecked_types, kind, bad, given, remedy):
    with refused(given, remedy):
        kind(**(DESCENT | bad))


@pytest.mark.parametrize("kind", [fc.GradientDescent, fc.SGD])
def test_momentum_out_of_range(kind):
    with refused("got momentum=1", "typical value"):
        kind(momentum=1.0, **DESCENT)
    with refused("got momentum=-0.5", "Correct momentum"):
        kind(momentum=-0.5, **DESCENT)
    with refused("nesterov=True with momentum=0", "Set momentum"):
        kind(nesterov=True, **DESCENT)


def test_other_trainings_out_of_range(unchecked_types):
    with refused("got time=-1", "Correct time"):
        fc.GradientFlow(time=-1.0)
    with refused("got penalty=-1", "Correct penalty"):
        fc.Ridge(penalty=-1.0)
    with refused("got toward='zeros'", "Did you mean 'zero'"):
        fc.Ridge(penalty=1.0, toward="zeros")
    with refused("got batch_size=0", "Correct batch_size"):
        fc.SGD(batch_size=0, **DESCENT)
    with refused("an order of 2 batches for 5 steps", "steps=len"):
        fc.AdamW(order=[[0], [1]], **DESCENT)


@pytest.mark.parametrize("batch", [[], [40], [-1]])
def test_order_of_samples_that_do_not_exist(batch):
    with refused("the batch of step 1 holds", "Give the order of the same samples"):
        forecast(fc.Features(PHI, Y), training=fc.SGD(learning_rate=0.1, steps=2, order=[[0], batch]))


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_classes_outside_the_head(loss):
    with refused(r"got training.classes=\(1, 3\) for a head of 3 outputs", "Grow the head first"):
        forecast(fc.Features(PHI, Y), training=fc.GradientDescent(classes=(1, 3), loss=loss, **DESCENT))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_label_that_the_loss_does_not_see(loss, streamed):
    with refused(r"label 0 is not among the outputs that the loss sees \(\[1, 2\]\)", "Add the label"):
        y = Y.clone()
        y[0] = 0
        new = fc.Features(lambda: iter([(PHI, y)])) if streamed else fc.Features(PHI, y)
        forecast(new, training=fc.GradientDescent(classes=(1, 2), loss=loss, **DESCENT))


@pytest.mark.parametrize(("row", "total"), [([0.5, 0.6, 0.1], "1.2"), ([1.5, -0.5, 0.0], "1")])
def test_cross_entropy_rows_that_are_no_probabilities(row, total):
    targets = torch.full((40, 3), 1 / 3).double()
    targets[5] = torch.tensor(row)
    with refused(f"row .* sums to {total}", "normalise the rows"):
        forecast(fc.Features(PHI, targets), training=fc.GradientDescent(loss="cross_entropy", **DESCENT))


def test_divergence_of_a_simulation():
    training = fc.GradientDescent(learning_rate=50.0, weight_decay=10.0, steps=400, loss="cross_entropy")
    with refused("the training diverged within 400 steps at learning rate 50", "Lower the learning rate"):
        forecast(fc.Features(PHI, Y), training=training)


def test_questions_out_of_range(unchecked_types):
    result = forecast(fc.Features(PHI, Y))
    with refused("got order='energies'", "Did you mean 'energy'"):
        result.vulnerable_rank(order="energies")
    for energy in (0.0, 1.1, math.nan):
        with refused(f"got energy={energy}", "Correct energy"):
            result.vulnerable_rank(energy)
    with refused("got k=0", "Correct k"):
        result.modes(0)
    with refused("got k=8", "Lower k"):
        result.certificate(8)
    with refused("got outputs=2", "Correct outputs"):
        result.head.grow(2)
