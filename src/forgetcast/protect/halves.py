r"""The merge of PEGP's released code: half of a projected training, half of one that nothing holds.

    p = trained from theta with projection
    q = trained from theta without, its normalised features pulled to those of p
    theta <- share p + (1 - share) q

Half of the unprojected step survives, so that no condition holds any more: it is here to be compared with, under its
own name. Source: code of arXiv 2405.13383 (CLIP, image prompts; five further epochs, share 0.5).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from forgetcast.checks import require_number
from forgetcast.modes import evaluating
from forgetcast.tuners.base import Tuned

Features = Callable[[nn.Module, Any], Tensor]
Pull = Callable[[Any], Tensor]


def merge_halves(
    tuned: Tuned,
    projected: Callable[[], None],
    free: Callable[[Pull], None],
    features: Features = lambda model, batch: model(batch),
    share: float = 0.5,
) -> None:
    """Train a tuner twice from where it stands, and keep a mixture of the two.

    Args:
        tuned: a model with a tuner in place; its parameters are changed.
        projected: trains it, within `protect(...)`.
        free: trains it again from the start, without; given `pull(batch)`, the mean squared distance of normalised
            features from those after the first training, to be added to the loss.
        features: (n, d) of a batch, for that distance.
        share: of the projected training.

    Raises:
        ValueError: a share outside 0 .. 1.

    Cost: both trainings, a copy of the model, and a forward pass of it in each step of the second.

    Examples:
        >>> import torch, forgetcast as fc
        >>> from forgetcast.protect.halves import merge_halves
        >>> from forgetcast.tuners.anatomy import Anatomy, Block
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> tuned = fc.Adapter(rank=2).attach(model, Anatomy((Block("", enter="0", leave="1"),)))
        >>> def to(value):
        ...     with torch.no_grad():
        ...         for parameter in tuned.parameters():
        ...             parameter.fill_(value)
        >>> merge_halves(tuned, lambda: to(1.0), lambda pull: to(3.0))
        >>> sorted({float(value) for part in tuned.state().values() for value in part.flatten()})
        [2.0]
    """
    require_number("share", share, most=1.0)
    start = {name: value.clone() for name, value in tuned.state().items()}
    projected()
    held = {name: value.clone() for name, value in tuned.state().items()}
    reference = copy.deepcopy(tuned.model).requires_grad_(False)

    def pull(batch: Any) -> Tensor:
        with torch.no_grad(), evaluating(reference):
            target = normalize(features(reference, batch), dim=1)
        return (normalize(features(tuned.model, batch), dim=1) - target).square().mean()

    tuned.load_state(start)
    free(pull)
    last = tuned.state()
    tuned.load_state({name: share * value + (1 - share) * last[name] for name, value in held.items()})
