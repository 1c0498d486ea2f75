"""Forecasts of trainings of some of the parameters, from what an anchored forecast of more of them has read."""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from forgetcast.checks import complaint
from forgetcast.forecast.network.along import along
from forgetcast.forecast.network.given import Given
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.plan import FORWARD, Budget, check_cost
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.network.start import Start
from forgetcast.forecast.network.surrogate import Surrogate
from forgetcast.forecast.network.walker import Place, follow
from forgetcast.forecast.training import SGD, AdamW, GradientDescent


def contains(larger: Network, smaller: Network) -> bool:
    """Whether the one trains all that the other trains, and the same of the head, and something of the body."""
    same_head = smaller.of_head.keys() == larger.of_head.keys()
    return bool(smaller.body) and smaller.body.keys() <= larger.body.keys() and same_head


def reading_cost(old: int) -> float:
    """What `forecast_within` costs, in passes forward and backward of one sample."""
    return FORWARD * old + check_cost(old)


def forecast_within(asked: Given, start: Start, larger: NetworkForecast) -> NetworkForecast:
    r"""Follow the training of some parameters along the surrogates of a training of more.

    An anchor's samples have gradients g along their directions in all parameters. Those c that train now take their
    part; the others stand where they started, and the features are taken back to there along the same gradients,

        phi(theta_c) ~ phi_k + v [ g_c . theta_c + g_rest . theta_0,rest - g . theta_k ]

    So anchors that are paid for once serve every smaller set: each forecast sees as many samples as all would have had
    together, and the noise of few samples, which moves parameters further than the run does and so makes a forecast
    of much training too gloomy, falls.

    Args:
        asked: where only the smaller set trains.
        start: at which the model stands.
        larger: an anchored forecast of the same training from the same start.

    Returns:
        The forecast; its check of the surrogates is that of the larger one.

    Raises:
        ValueError: a forecast without surrogates, parameters that it does not have.

    Cost: one reading of the old samples, and two of some of them; n P numbers for n samples of the anchors.
    """
    started = perf_counter()
    net, training = asked.net, asked.training
    if not larger._surrogates or not isinstance(training, SGD | AdamW | GradientDescent):
        raise complaint(f"surrogates of a {larger.estimator} forecast", "an anchored one", "Forecast each on its own.")
    if not contains(larger._net, net):
        raise complaint(
            f"parameters {sorted(net.body)}", f"some of {sorted(larger._net.body)}, and the same head", "Leave it out."
        )
    stands = larger.start.theta
    own = _places(larger._net.body, net, stands)
    parts = tuple(_restricted(near, own, stands) for near in larger._surrogates)
    here = Place(net.theta(), net.weight(), net.bias())
    held = larger._stock
    used = larger._windows, larger._shares
    path = follow(net, training, here, parts, [training.steps], larger.batching, *used, stock=held)
    run = round(training.steps * larger.batching.size)
    cost = reading_cost(len(asked.old))
    plan = Budget(run, (), 0, (training.steps,), 0, 1, cost, 0.0, exact=False)
    settings = {**larger.settings, "within": True}
    found = along(asked, start, replace(path, stock=held), plan, settings, estimator=larger.estimator, started=started)
    return replace(found, trust=replace(found.trust, surrogate_error=larger.trust.surrogate_error))


def _places(body: Mapping[str, Tensor], net: Network, like: Tensor) -> Bool[Tensor, " P"]:
    """Which of the parameters, in order, the network has."""
    marks = [torch.full((value.numel(),), name in net.body, device=like.device) for name, value in body.items()]
    return torch.cat(marks)


def _restricted(near: Surrogate, own: Bool[Tensor, " P"], stands: Float[Tensor, " P"]) -> Surrogate:
    """What a surrogate says where all parameters but some stay at the start."""
    rest = torch.where(own, 0.0, stands)
    return replace(near, gradients=near.gradients[:, own], offsets=near.offsets - near.gradients @ rest)
