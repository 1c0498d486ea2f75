r"""Adapters of a new task that begin as those before, and are merged with all earlier ones while they train.

    begin   A_t <- A_{t-1}
    merge   A_t <- (1 - a) A_t + a m,      m = mean_{s<t} A_s

Merged after each of n steps s_1 ... s_n, they end at  m + (1 - a)^n (A_{t-1} - m) + sum_k (1 - a)^(n-k+1) s_k:  a step
is forgotten at the rate 1 - a, and nothing is where a = 0.

Source: adapter merging of MOS, arXiv 2412.09441; that adapters begin as those before, as in its released code.
"""

import torch

from forgetcast.tuners.expandable import Expandable


def begin_as_before(network: Expandable) -> None:
    """New adapters, which train; equal to the last ones that settled, if any have."""
    network.begin()
    if network.newest is not None and len(network.settled):
        network.newest.load_state_dict(network.settled[-1].state_dict())


def merge(network: Expandable, momentum: float) -> None:
    """Take the newest adapters that share of the way to the mean of the settled ones; nowhere without any.

    Args:
        network: the adapters.
        momentum: a.

    Cost: t times the numbers of a set of adapters.
    """
    if network.newest is None or not len(network.settled):
        return
    earlier = (adapters.parameters() for adapters in network.settled)
    with torch.no_grad():
        for value, *old in zip(network.newest.parameters(), *earlier, strict=True):
            value.lerp_(torch.stack(old).mean(0), momentum)
