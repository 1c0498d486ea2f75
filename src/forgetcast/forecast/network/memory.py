r"""What a run has fitted already: how steps on a sample move that sample's own logits.

An anchor reads samples that the forecast path was not trained on. The run was: it reads each sample once an epoch, and
one such step, at rate eta on a batch of b, moves the sample's own logits z_i by

    - (eta / b) K_i e_i,        K_i = (g_i . P g_i) (W v_i)(W v_i)^T + diag(phi_i^2 P_W^T + P_b)

with e_i the gradient of its loss at z_i, g_i, v_i and phi_i as in `surrogate`, and P the optimiser's preconditioner
(Adam: 1 / sqrt of the second moment; SGD: 1 / (1 - momentum)). This self-influence tells training samples from others;
without it a forecast takes a sample that the run has fitted for a hard one, and from the second epoch on moves too far.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.forecast.network.steps import Batching
from forgetcast.forecast.network.surrogate import Surrogate
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, rate_at

SUBSTEPS = 4
MOST_SUBSTEPS = 8


def visits(training: SGD | AdamW | GradientDescent, batching: Batching, step: int) -> tuple[int, float]:
    """How often the run has read a sample of the batch of this step before, and the sum of those rates / batch size."""
    before = int(step * batching.size / batching.population + 1e-9)
    read = round(before * batching.population / batching.size)
    rates = sum(rate_at(training.learning_rate, k) for k in range(read))
    return before, rates / batching.population * (1 if training.reduction == "mean" else batching.size)


def fitted(
    near: Surrogate,
    squares: Float[Tensor, "n P"],
    theta: Float[Tensor, " P"],
    weight: Float[Tensor, "C d"],
    bias: Float[Tensor, " C"],
    gains: tuple[Float[Tensor, " P"], Float[Tensor, "C d"], Float[Tensor, " C"]],
    often: int,
    length: float,
) -> Float[Tensor, "n C"]:
    """By how much the run's own steps on these samples have moved their logits; zero for samples the path has read.

    Args:
        near: samples at their anchor.
        squares: g_i^2.
        theta: of the body.
        weight: of the head.
        bias: of the head.
        gains: the preconditioner of each; zero where nothing trains.
        often: earlier reads of each sample.
        length: of all of them together, in units of the preconditioner.

    Cost: 2 n P.
    """
    features = near.moved(theta)
    logits = features @ weight.T + bias
    shift = torch.zeros_like(logits)
    if not often:
        return shift
    seen = near.directions @ weight.T
    body = squares @ gains[0]
    head = features.square() @ gains[1].T + gains[2]
    substeps = min(SUBSTEPS * often, MOST_SUBSTEPS)
    part = length / substeps
    # semi-implicit: no sample can be fitted beyond its own minimum
    bound = 1 + part * (body * seen.square().sum(1) + head.amax(1))
    errors = near.objective.errors(logits)
    for _ in range(substeps):
        error = errors(logits + shift)
        move = (body * (seen * error).sum(1))[:, None] * seen + head * error
        shift -= part * move / bound[:, None]
    return torch.where(near.unread[:, None], shift, 0.0)
