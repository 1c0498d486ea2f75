"""Features are computed once; other weights, samples or preprocessing are other features; damage is noticed."""

import numpy as np
import pytest
import torch
from torch import nn

from forgetcast.backbones import cache
from forgetcast.backbones.cache import cached_features

INPUTS = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(inputs)


def read(places: np.ndarray) -> torch.Tensor:
    return INPUTS[torch.from_numpy(places)]


def test_second_time_nothing_is_computed(tmp_path):
    network, seen = Counting(), []
    phi = cached_features(network, read, 23, tmp_path, data_hash="a", batch_size=5, on_batch=seen.append)
    assert (network.calls, sum(seen)) == (5, 23)
    assert network.training  # left as it was, though run in evaluation mode
    again = cached_features(network, read, 23, tmp_path, data_hash="a", batch_size=9)
    assert network.calls == 5
    assert torch.equal(phi, again)
    assert torch.allclose(phi, network.eval()(INPUTS))


@pytest.mark.parametrize("changed", ["weights", "data", "preprocessing", "rows"])
def test_other_features_for_anything_else(changed, tmp_path):
    arguments = {"rows": 23, "data_hash": "a", "preprocessing": "p"}
    cached_features(Counting(), read, folder=tmp_path, **arguments)
    other = {"weights": {}, "data": {"data_hash": "b"}, "preprocessing": {"preprocessing": "q"}, "rows": {"rows": 20}}
    network = Counting(seed=1 if changed == "weights" else 0)
    cached_features(network, read, folder=tmp_path, **arguments | other[changed])
    assert network.calls > 0
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_damaged_file_is_made_again(damage, tmp_path):
    phi = cached_features(Counting(), read, 23, tmp_path, data_hash="a")
    (path,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes({"bit": content, "cut": content[:-8], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(cached_features(Counting(), read, 23, tmp_path, data_hash="a"), phi)
    assert torch.equal(cached_features(Counting(), read, 23, tmp_path, data_hash="a"), phi)


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    def broken(places: np.ndarray) -> torch.Tensor:
        return torch.full((len(places), 6), torch.nan)

    with pytest.raises(ValueError, match=r"features .* holds nan at \[0, 0\]"):
        cached_features(Counting(), broken, 23, tmp_path, data_hash="a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [0, 7, 8, 17, 22])
def test_interrupted_computation_goes_on_with_the_part_that_was_not_finished(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PART_ROWS", 8)
    whole = cached_features(Counting(), read, 23, tmp_path / "whole", data_hash="a", batch_size=3)

    def interrupted(places: np.ndarray) -> torch.Tensor:
        if stop in places:
            raise KeyboardInterrupt
        return read(places)

    with pytest.raises(KeyboardInterrupt):
        cached_features(Counting(), interrupted, 23, tmp_path / "cut", data_hash="a", batch_size=3)
    for half_written in tmp_path.glob("cut/*"):
        (half_written / "000000016.1.part").write_bytes(b"half")  # what a kill while writing leaves
    seen: list[int] = []
    phi = cached_features(Counting(), read, 23, tmp_path / "cut", data_hash="a", batch_size=3, on_batch=seen.append)
    assert torch.equal(phi, whole)
    assert sum(seen) == 23 - stop // 8 * 8
