"""Where the parts of transformers are found."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tuned_models import KINDS, LAYERS, WIDTH, small  # noqa: E402

from forgetcast.tuners.adapter import Adapter  # noqa: E402
from forgetcast.tuners.anatomy import Anatomy, Block, anatomy, widths  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_its_projections_and_its_feed_forward_network(kind):
    model = small(kind)
    width = 2 * WIDTH if kind == "llama" else WIDTH
    found = anatomy(model)
    assert len(found.blocks) == LAYERS
    for block in found.blocks:
        projections = (block.fused,) if block.fused else (block.query, block.key, block.value)
        for name in projections:
            assert name is not None
            assert widths(model.get_submodule(name))[0] == width
        assert (block.fused is None) == (block.query is not None)
        assert widths(model.get_submodule(block.enter))[0] == width
        assert widths(model.get_submodule(block.leave))[1] == width


class Own(nn.Module):
    """Names that nothing knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = x + stage(x)
        return x


def test_a_model_of_ones_own_is_described_by_hand():
    model, x = Own(), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"no list of transformer blocks in Own; .*anatomy=Anatomy"):
        Adapter().attach(model)
    parts = Anatomy(tuple(Block(f"stages.{k}", f"stages.{k}.0", f"stages.{k}.2") for k in range(3)))
    before = model(x)
    tuned = Adapter(rank=2, layers=[0, -1]).attach(model, parts)
    assert torch.equal(model(x), before)
    assert [name.split(".")[1] for name in tuned.named_parameters()] == ["0", "0", "2", "2"]
    with pytest.raises(ValueError, match="a model with a tuner in place"):
        Adapter(rank=2, layers=[0, -1]).attach(model, parts)
    tuned.detach()
    shared = Anatomy((parts.blocks[0], Block("again", "stages.0.0", "stages.0.2")))
    with pytest.raises(ValueError, match="blocks that are one module"):
        Adapter().attach(model, shared)
    broken = Anatomy((parts.blocks[0], Block("stages.1", "stages.1.0", "stages.1.1")))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="the widths of a Tanh"):
        Adapter().attach(model, broken)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attention_to_another_sequence_is_no_feed_forward_network():
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, add_cross_attention=True, vocab_size=50)
    config.bos_token_id = config.eos_token_id = 0
    block = anatomy(transformers.GPT2Model(config)).blocks[1]
    assert (block.enter, block.leave) == ("h.1.mlp.c_fc", "h.1.mlp.c_proj")


@pytest.mark.parametrize("layers", [[], [3], [-4], [0, 0], [0, -3]])
def test_layers_that_are_not_there(layers):
    parts = Anatomy(tuple(Block(f"stages.{k}", f"stages.{k}.0", f"stages.{k}.2") for k in range(3)))
    with pytest.raises(ValueError, match=r"layers=|a layer="):
        parts.layers(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "got rank=0"),
        ({"scale": 0.0}, "got scale=0.0"),
        ({"activation": "softplus"}, "got activation='softplus'"),
    ],
)
def test_options_of_adapters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Adapter(**options)
