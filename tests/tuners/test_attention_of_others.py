"""Whose attention tokens can enter: what is refused, and what others find in its place."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tuned_models import LAYERS, hidden, inputs, small

from forgetcast.tuners.anatomy import Anatomy, anatomy
from forgetcast.tuners.placed import Heads, heads_of
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt


def test_attention_that_is_computed_by_hand_is_refused():
    model = small("vit")
    model.set_attn_implementation("eager")
    tuned = Prefix().attach(model)
    with pytest.raises(ValueError, match=r"computes attention by itself.*expected a call of .*scaled_dot_product"):
        hidden(model, inputs("vit", 1))
    model.set_attn_implementation("sdpa")
    hidden(model, inputs("vit", 1))
    assert not torch.overrides._get_current_function_mode_stack()
    tuned.detach()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_inside_attention_leaves_nothing_behind(error):
    model = small("vit")
    tuned = Prefix().attach(model)

    def fail(*_: object) -> None:
        raise error

    handle = model.get_submodule(anatomy(model).blocks[1].query).register_forward_hook(fail)
    with pytest.raises(error):
        hidden(model, inputs("vit", 1))
    assert not torch.overrides._get_current_function_mode_stack()
    handle.remove()
    assert hidden(model, inputs("vit", 1)).isfinite().all()
    tuned.detach()


def test_heads_that_nothing_names_are_asked_for():
    model = small("fused")
    for k in range(LAYERS):
        del model.blocks[k].attn.num_heads
    with pytest.raises(ValueError, match=r"heads of blocks.0.attn.*num_heads"):
        Prefix().attach(model)
    for k in range(LAYERS):
        model.blocks[k].attn.num_heads = 5
    with pytest.raises(ValueError, match=r"72 outputs for 5 heads of 4.*expected 60 outputs"):
        Prefix().attach(model)
    assert not [name for name, _ in model.named_parameters() if "prefix" in name]


def test_heads_may_be_wider_than_their_share_of_the_width():
    """One projection of 4 heads of queries and 2 of keys and values, each 16 wide, from inputs of width 48."""
    sizes = {"vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model, ids = transformers.Phi3Model(transformers.Phi3Config(**sizes, **heads, **tokens)).eval(), inputs("llama", 2)
    before = hidden(model, ids).detach()
    (block,) = anatomy(model).blocks
    assert heads_of(model, block) == Heads(48, 4, 2, 16)
    Prompt(length=3).attach(model)
    torch.testing.assert_close(hidden(model, ids), before)


def test_blocks_that_are_not_as_described_are_refused():
    model = small("vit")
    blocks = anatomy(model).blocks
    nameless = Anatomy(tuple(replace(block, norm=None) for block in blocks))
    tuned = Prompt().attach(model, nameless)
    with pytest.raises(ValueError, match=r"attention inputs of a block without a normalisation.*norm= in the anatomy"):
        hidden(model, inputs("vit", 2))
    tuned.detach()
    swapped = Anatomy(tuple(replace(block, key=block.value, value=block.key) for block in blocks))
    tuned = Prompt().attach(model, swapped)
    with pytest.raises(ValueError, match=r"values of each head that are \d+% from what the block has"):
        hidden(model, inputs("vit", 2))
    tuned.detach()
    rows = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen3Config(**rows, num_key_value_heads=2, intermediate_size=32, head_dim=12)
    torch.manual_seed(0)
    model = transformers.Qwen3Model(config).eval()
    with torch.no_grad():
        model.layers[0].self_attn.k_norm.weight.fill_(3.0)
    tuned = Prompt().attach(model)
    with pytest.raises(ValueError, match=r"lengths of keys .*Take Prefix"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    tuned.detach()
    Prefix().attach(model)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_copies_do_not_share_their_frozen_layers():
    tuned = Prompt(length=3, gated=False).attach(small("vit"))
    other = copy.deepcopy(tuned.model)
    before = hidden(other, inputs("vit", 1)).detach()
    with torch.no_grad():
        for block in anatomy(tuned.model).blocks:
            tuned.model.get_submodule(block.key).weight.zero_()
    assert torch.equal(hidden(other, inputs("vit", 1)), before)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler
@pytest.mark.parametrize("options", [Prefix(length=3), Prompt(length=3, gated=False)])
def test_a_compiled_model_computes_the_same(unchecked_types, options):
    tuned = options.attach(small("fused"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    expected = hidden(tuned.model, inputs("fused", 2)).detach()
    found = torch.compile(tuned.model, backend="eager")(**inputs("fused", 2)).detach()
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_forward_that_somebody_else_has_put_in_place_stays():
    model = small("fused")
    calls: list = []
    attention = model.blocks[0].attn
    plain = attention.forward
    attention.forward = lambda x: calls.append(1) or plain(x)
    own = attention.forward
    before = hidden(model, inputs("fused", 1)).detach()
    tuned = Prefix(length=3).attach(model)
    assert torch.allclose(hidden(model, inputs("fused", 1)), before, atol=1e-12)
    tuned.detach()
    assert attention.forward is own
    assert "forward" not in vars(model.blocks[1].attn)
    assert len(calls) == 2
