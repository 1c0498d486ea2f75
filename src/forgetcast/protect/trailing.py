"""Steps of split layers kept out of their leading singular directions, whatever the optimiser."""

from collections.abc import Mapping

import torch
from torch import Tensor

from forgetcast.forecast.network.head import Restraint
from forgetcast.methods.base import Model, Protection
from forgetcast.tuners.split import allowed


class TrailingSteps(Protection):
    """Takes back what a step did in the leading directions of the layers that `tuners.split.split` has split.

    It is the step that is projected, after the optimiser has clipped, scaled and decayed: for plain SGD the same as to
    project gradients; Adam, which scales entries apart, would leave the space that they lie in.

    Cost: four products a layer and step, with k columns or with the trailing ones.
    """

    def after_step(self, model: Model) -> None:
        """Project U and V."""
        with torch.no_grad():
            for name, what in allowed(model).items():
                value = model.get_parameter(name)
                value.copy_(what.value(value))

    def restraint(self, model: Model) -> Restraint:
        """The same, of any step."""
        known = allowed(model)

        def restrained(_: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: known[name].step(value) if name in known else value for name, value in step.items()}

        return restrained
