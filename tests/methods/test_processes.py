"""Two processes end with the weights, memories and statistics of one, whatever the method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import stream
from two_processes_methods import OPTIMIZATION, tensors, trained

from forgetcast.methods.registry import METHODS, method_class

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each of two processes ends with, by method."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(HERE), str(HERE.parent / "learn")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(HERE / "two_processes_methods.py"), str(folder), *METHODS]
    subprocess.run([*launch, *script], env=environment, check=True, capture_output=True, timeout=240)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_a_process_without_a_sample_of_its_own_is_among_the_cases():
    assert len(stream()[1].train) % OPTIMIZATION.batch_size == 1


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_end_as_one(name, ends):
    # a closed form reads every sample on each process; steps sum gradients in another order
    tolerance = 1e-6 if method_class(name).by_gradient else 0.0
    whole = tensors(trained(name).state_dict())
    for end in (ends[0][name], ends[1][name]):
        assert end.keys() == whole.keys()
        for key, value in whole.items():
            if value.is_floating_point() and tolerance:
                assert torch.equal(end[key].isnan(), value.isnan()), key
                difference = (end[key] - value).nan_to_num().norm()
                assert difference <= tolerance * max(1.0, float(value.nan_to_num().norm())), key
            elif value.is_floating_point():
                torch.testing.assert_close(end[key], value, atol=0.0, rtol=0.0, equal_nan=True)
            else:
                assert torch.equal(end[key], value), key
