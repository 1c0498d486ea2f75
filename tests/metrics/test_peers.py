"""Our definitions give the numbers of Avalanche's and Continuum's own code."""

import json

import numpy as np
import pytest
from peers import NUMBERS, PEERS, draw, missing

from forgetcast.metrics.matrix import METRICS
from forgetcast.metrics.transfer import forward_transfer

CASES = json.loads(NUMBERS.read_text())["cases"]


def ours(name, a, baseline):
    if name == "forward_transfer":
        return forward_transfer(a, baseline)
    return METRICS[name](a)


def check(a, baseline, theirs):
    for name, value in theirs.items():
        assert ours(name, a, baseline) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_numbers_that_the_peers_gave(peer, case):
    check(CASES[case]["accuracies"], CASES[case]["baseline"], CASES[case][peer])


@pytest.mark.parametrize("peer", PEERS)
def test_the_peers_themselves(peer):
    reason = missing(peer)
    if reason is not None:
        pytest.skip(reason)
    generator = np.random.default_rng(1)
    for tasks in range(2, 22):
        a, baseline = draw(tasks, generator)
        check(a, baseline, PEERS[peer](a, baseline))


def test_no_two_definitions_are_one():
    """Of those that are called forgetting or transfer, no two agree on all of the peers' matrices."""
    names = [name for name in METRICS if not name.endswith("accuracy")]
    for index, first in enumerate(names):
        for second in names[:index]:
            gaps = [METRICS[first](case["accuracies"]) - METRICS[second](case["accuracies"]) for case in CASES]
            assert max(map(abs, gaps)) > 1e-3, (first, second)
