"""Checkpoints are whole or not there; damage is noticed and passed over; nothing is unpickled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast.learn.checkpoint import checkpoints, load_checkpoint, save_checkpoint

STATE = {
    "weights": {"a/b": torch.arange(6.0).view(2, 3), "a": {"b": torch.zeros(0, dtype=torch.int64)}},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.999)},
    "values": [1, 2.5, None, True, "text", [], (), {}],
    "half": torch.ones(3, dtype=torch.bfloat16),
    "view": torch.arange(9)[::2],
}


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_round_trip(tmp_path):
    assert load_checkpoint(tmp_path, owner="me") is None
    save_checkpoint(tmp_path, 7, STATE, owner="me")
    number, state = load_checkpoint(tmp_path, owner="me")
    assert number == 7
    assert same(state, STATE)


VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
NESTED = st.recursive(
    VALUES,
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), own, max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(NESTED)
def test_any_plain_value_comes_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, 0, {"value": value}, owner="me")
    _, state = load_checkpoint(folder, owner="me")
    assert same(state, {"value": value})


def test_only_the_newest_stay(tmp_path):
    for number in range(5):
        save_checkpoint(tmp_path, number, {"number": number}, owner="me", keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000003", "000000004"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json", "manifest"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damaged_newest_falls_back_and_says_so(name, damage, tmp_path):
    for number in range(2):
        save_checkpoint(tmp_path, number, {**STATE, "number": number}, owner="me")
    place = tmp_path / "000000001" / name
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        place.unlink()
    else:
        place.write_bytes(content if damage == "bit" else content[: len(content) // 2])
    with pytest.warns(UserWarning, match="000000001 is damaged .* the checkpoint before it is taken instead"):
        _, state = load_checkpoint(tmp_path, owner="me")
    assert state["number"] == 0


def test_all_damaged_and_foreign(tmp_path):
    save_checkpoint(tmp_path, 0, STATE, owner="me")
    with pytest.raises(ValueError, match="belongs to me .* expected a checkpoint of you"):
        load_checkpoint(tmp_path, owner="you")
    (tmp_path / "000000000" / "values.json").write_text("{")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="all 1 checkpoints .* are damaged"),
    ):
        load_checkpoint(tmp_path, owner="me")


def test_half_written_checkpoint_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 0, {"number": 0}, owner="me")
    part = tmp_path / ".part-000000001"
    part.mkdir()
    (part / "values.json").write_text("{}")
    assert load_checkpoint(tmp_path, owner="me")[1] == {"number": 0}
    save_checkpoint(tmp_path, 1, {"number": 1}, owner="me")
    assert not part.exists()


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(ValueError, match="the state holds a object at /method/thing"):
        save_checkpoint(tmp_path, 0, {"method": {"thing": object()}}, owner="me")
    assert list(tmp_path.iterdir()) == []
