"""The one place that picks closed form or simulation."""

from forgetcast.checks import complaint
from forgetcast.forecast.closed_form import closed_path, read
from forgetcast.forecast.path import WeightPath, spanned
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.simulate import SimulatedPath
from forgetcast.forecast.training import SGD, AdamW, Training, is_closed_form
from forgetcast.tangent.features import Features, check_targets
from forgetcast.tangent.linear_head import LinearHead, check_width


def weight_path(new: Features, head: LinearHead, training: Training, penalty: QuadraticPenalty | None) -> WeightPath:
    """Where `training` on `new` takes the head: closed form for full-batch squared loss, else simulation."""
    weight = head.stacked()
    if penalty is not None and (penalty.root.shape[1], penalty.target.shape[1]) != tuple(weight.shape):
        raise complaint(
            f"a penalty on weights of shape ({penalty.root.shape[1]}, {penalty.target.shape[1]}) for a head of shape "
            f"{tuple(weight.shape)} (bias included)",
            "equal shapes",
            "Build the penalty with this head, and grow both to the same number of outputs.",
        )
    if is_closed_form(training):
        return closed_path(training, read(new, head, training.classes), weight, penalty)
    if new.shuffled and isinstance(training, SGD | AdamW):
        raise complaint(
            f"{new.name}: a DataLoader with shuffle=True for a replay of minibatches",
            "the samples in the order that training.seed or training.order refers to",
            "Give a DataLoader with shuffle=False, or arrays.",
        )
    phi, y = new.gather()
    check_width(new.name, phi, head)
    y = check_targets(new.name, y, head.outputs)
    gathered = Features(phi, y, new.block_rows, new.name)
    within_new = spanned(training, penalty)
    return SimulatedPath(training.steps, within_new, training, gathered, weight.to(phi.device), penalty)
