"""Parameters by module: blocks of any stack, or patterns."""

import pytest
from torch import nn

from forgetcast.forecast.network.modules import modules_of


def test_blocks_of_a_stack_whatever_is_numbered_inside_them():
    class Block(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2), nn.Linear(2, 2))

    model = nn.Sequential(nn.ModuleDict({"embed": nn.Embedding(3, 2), "layer": nn.ModuleList([Block(), Block()])}))
    found = modules_of(name for name, _ in model.named_parameters())
    assert list(found) == ["0.embed", "0.layer.0", "0.layer.1"]
    assert found["0.layer.1"] == ("0.layer.1.0.weight", "0.layer.1.0.bias", "0.layer.1.1.weight", "0.layer.1.1.bias")


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["weight", "bias"], ["weight", "bias"]),
        (["0.weight", "0.bias"], ["0"]),
        (["net.layer.3.query.lora_A.weight", "net.layer.3.value.lora_A.weight"], ["net.layer.3"]),
        (["encoder.embed.word", "encoder.embed.place", "encoder.norm.weight"], ["encoder.embed", "encoder.norm"]),
        (["a.layer.0.w", "a.layer.10.w", "a.layer.2.w"], ["a.layer.0", "a.layer.10", "a.layer.2"]),
    ],
)
def test_modules_by_name(names, modules):
    found = modules_of(names)
    assert list(found) == modules
    assert [name for own in found.values() for name in own] == names


def test_patterns():
    names = ["stage.0.a", "stage.0.b", "stage.1.a", "norm.a"]
    assert modules_of(names, ["norm.*", "stage.*"]) == {"norm.*": ("norm.a",), "stage.*": tuple(names[:3])}
    for patterns, message in [
        (["stage.*"], "norm.a in the modules \\[\\]"),
        (["stage.*", "norm.*", "*.b"], "stage.0.b in the modules"),
        (["stage.*", "norm.*", "head.*"], "'head"),
    ]:
        with pytest.raises(ValueError, match=message):
            modules_of(names, patterns)


def test_nothing_trains():
    with pytest.raises(ValueError, match="no parameter that trains"):
        modules_of([])
