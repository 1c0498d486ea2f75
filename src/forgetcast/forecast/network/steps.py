r"""Optimisers along their expected path: what a step does on average over minibatches, noise included.

A minibatch of b of all N samples, drawn without replacement, has a gradient of mean g and variance s v(b),

    v(b) = (N - b) / (b (N - 1))        with s the spread of per-sample gradients; v(1) = 1, v(N) = 0

Plain SGD follows g. Adam divides by the root of the second moment of what it sees,

    E[g_b^2] = g^2 + s v(b)             (for each parameter)

so a forecast that knows s can follow the run's expected path without its noise. With n samples at hand, mean^2 is too
large by s v(n), which is taken off.

What the samples at hand leave uncertain of the momentum m, s v(n') with n' those that it still remembers, is no
direction of the run's: m is shrunk, parameter by parameter, as a Wiener filter does,

    m <- m  m^2 / (m^2 + s v(n'))

From a fresh head gradients are small beside their noise, and a root that knows less noise than the gradient has lets it
steer. There the second moment is that of the few samples at hand, as if they were the run's batches: noise moves
parameters no further than a run's does.

Where every batch is the run's own, there is no correction, and these are `torch.optim.SGD` and `AdamW`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from forgetcast.forecast.network.surrogate import Slope
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, rate_at

TINY = 1e-30
STRIDE = 1.5
"""Largest step of a parameter in units of the learning rate, where its noise is guessed from fewer samples than b."""


@dataclass(frozen=True)
class Batching:
    """How a training draws its samples.

    Attributes:
        size: b, samples in a batch; the mean, where they differ.
        population: N, samples that the batches are drawn from.
        exact: whether every slope is that of the run's own batch.
        few: whether the second moment is that of the samples at hand, as if these were the run's batches.
    """

    size: float
    population: int
    exact: bool = False
    few: bool = False

    def noise(self, samples: float) -> float:
        """v(n): variance of the mean of n samples, in units of the spread of one."""
        others = self.population - 1
        return max(self.population - samples, 0.0) / (samples * others) if others else 0.0


@dataclass
class ExpectedStep:
    """The state of one parameter tensor under the expected path of an optimiser.

    Attributes:
        training: what is forecast.
        start: the parameters at the start, for the drift penalty.
        batching: b and N.
    """

    training: SGD | AdamW | GradientDescent
    start: Tensor
    batching: Batching
    count: int = 0
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    noise: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first = torch.zeros_like(self.start)
        self.second = torch.zeros_like(self.start)
        self.noise = torch.zeros_like(self.start)

    def expected_square(self, value: Tensor, slope: Slope, samples: float) -> float:
        """Expected squared norm of a minibatch gradient."""
        gradient, spread, excess = self._moments(value, slope, samples)
        square = float(gradient.square().sum())
        return square if spread is None else square + excess * float(spread.sum())

    def step(self, value: Tensor, slope: Slope, samples: float, lately: float, factor: float = 1.0) -> None:
        """Move `value` by one step of the run.

        Args:
            value: the parameters, changed in place.
            slope: mean and mean square of per-sample gradients.
            samples: n, the effective number of samples behind the slope.
            lately: samples behind the slopes that the momentum still remembers.
            factor: by which gradients are clipped.
        """
        training = self.training
        gradient, spread, excess = self._moments(value, slope, samples)
        if factor != 1:
            gradient = gradient * factor
            spread = None if spread is None else spread * factor**2
        rate = rate_at(training.learning_rate, self.count)
        self.count += 1
        if not isinstance(training, AdamW):
            self._descend(value, gradient + training.weight_decay * value, rate)
            return
        value.mul_(1 - rate * training.weight_decay)
        beta1, beta2 = training.betas
        known1, known2 = 1 - beta1**self.count, 1 - beta2**self.count
        scale = known2**0.5 / known1  # both bias corrections, taken into the step's length: they cost no pass
        self.first.lerp_(gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if spread is None:
            root = self.second.sqrt().add_(training.epsilon * known2**0.5)
            value.addcdiv_(self.first, root, value=-rate * scale)
            return
        if not self.batching.few:
            self.second.add_(spread, alpha=(1 - beta2) * excess)
        self.noise.mul_(beta2).add_(spread, alpha=(1 - beta2) * self.batching.noise(self.batching.size))
        root = torch.maximum(self.second, self.noise).sqrt_().add_(training.epsilon * known2**0.5)
        sure = self.first.square()
        all_of_it = torch.add(sure, spread, alpha=self.batching.noise(lately) * known1**2).clamp_min_(TINY)
        stride = sure.div_(all_of_it).mul_(self.first).div_(root)
        value.sub_(stride.clamp_(-STRIDE / scale, STRIDE / scale), alpha=rate * scale)

    def gain(self) -> Tensor:
        """How far a unit of gradient moves each parameter in the end, in units of the rate; 0 before a first step."""
        training = self.training
        if not isinstance(training, AdamW):
            return torch.full_like(self.start, 1 / (1 - training.momentum))
        known = (1 - training.betas[1] ** self.count) ** 0.5
        root = torch.maximum(self.second, self.noise).sqrt_()
        return torch.where(root > 0, known / (root + training.epsilon * known), 0.0)

    def _moments(self, value: Tensor, slope: Slope, samples: float) -> tuple[Tensor, Tensor | None, float]:
        """Expected gradient g; spread s of samples, None for the run's own batches; k in E[g_b^2] = g^2 + k s."""
        training = self.training
        mean, second = slope.mean.view_as(value), slope.second.view_as(value)
        if training.reduction != "mean":
            mean, second = mean * self.batching.size, second * self.batching.size**2
        gradient = mean + training.drift_penalty * (value - self.start) if training.drift_penalty else mean
        if self.batching.exact:
            return gradient, None, 0.0
        spread = torch.addcmul(second, mean, mean, value=-1).clamp_min_(0)
        noise = self.batching.noise
        spread *= 1 / max(1 - noise(samples), 1 / 3)  # n samples spread less about their own mean than about g
        return gradient, spread, noise(self.batching.size) - noise(samples)

    def _descend(self, value: Tensor, gradient: Tensor, rate: float) -> None:
        training = self.training
        assert not isinstance(training, AdamW)
        if training.momentum:
            if self.count == 1:
                self.first.copy_(gradient)
            else:
                self.first.mul_(training.momentum).add_(gradient)
            gradient = gradient.add(self.first, alpha=training.momentum) if training.nesterov else self.first
        value.sub_(gradient, alpha=rate)
