"""Passes along the stream of tokens: what is added is what a block written out gives, and nothing stays behind."""

import copy
import threading
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from tuned_models import FusedModel

from forgetcast.tuners.adapter import Bottleneck
from forgetcast.tuners.anatomy import anatomy
from forgetcast.tuners.generated import Added, Gated, Generator, Inserted, Read
from forgetcast.tuners.sections import Branch, Sections, tokens_of, width_of
from forgetcast.tuners.stream import Pass, Stream

WIDTH, TOKENS, LENGTH = 24, 5, 3


class First(nn.Module):
    """The first token of what a model makes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.model(x)
        return (found if isinstance(found, torch.Tensor) else found.last_hidden_state)[:, 0]


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    return First(transformers.ViTModel(config, add_pooling_layer=False).eval())


def plain() -> nn.Module:
    torch.manual_seed(0)
    return First(FusedModel().eval())


def inputs(name: str, n: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn((n, 3, 16, 16) if name == "vit" else (n, TOKENS, WIDTH), generator=draw)


MODELS = {"vit": vit, "plain": plain}


def drawn(module: nn.Module, scale: float = 0.3) -> nn.Module:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return module


def adapters() -> nn.ModuleList:
    return nn.ModuleList(Bottleneck(WIDTH, WIDTH, 16, "relu", 0.1, True) for _ in range(2))  # 4 may all be off


def written_out(x: torch.Tensor, model: FusedModel, kind: str, parts: nn.ModuleList) -> torch.Tensor:
    """The blocks of the fused model, token by token, with what a pass of each kind does."""
    prompts = None
    for k, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x))
        if kind == "added":
            x = x + block.mlp(block.norm2(x)) + parts[k](x)
        elif kind == "read":
            own = parts[k].norm(parts[k].mix.weight @ x)
            prompts = own if prompts is None else own + 0.1 * prompts
            unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = x + parts[k].gate * ((unit @ prompts.mT / WIDTH**0.5).softmax(-1) @ prompts)
            x = x + block.mlp(block.norm2(x))
        else:
            old = x[:, 1 : 1 + LENGTH] if k else None
            bare = torch.cat([x[:, :1], x[:, 1 + LENGTH :]], 1) if k else x
            new = parts[k].norm((parts[k].mix.weight @ bare) + parts[k].mix.bias[:, None])
            if old is not None:
                new = new + 0.1 * old
            made = block.mlp(block.norm2(torch.cat([bare[:, :1], new, bare[:, 1:]], 1)))
            kept = old if old is not None else torch.zeros_like(new)
            x = made + torch.cat([bare[:, :1], kept, bare[:, 1:]], 1)
    return x[:, 0]


def begun(kind: str, parts: nn.ModuleList) -> Pass:
    return {
        "added": lambda: Added(parts),
        "read": lambda: Read(parts, 0.1),
        "inserted": lambda: Inserted(parts, LENGTH, 0.1),
    }[kind]()


def parts_of(kind: str) -> nn.ModuleList:
    if kind == "added":
        return adapters()
    make = Gated if kind == "read" else partial(Generator, zero=True)
    return nn.ModuleList(make(TOKENS, LENGTH, WIDTH) for _ in range(2))


@pytest.mark.parametrize("kind", ["added", "read", "inserted"])
def test_passes_against_blocks_written_out(kind):
    model, x = plain(), inputs("plain")
    parts = drawn(parts_of(kind))
    stream = Stream(model, anatomy(model))
    with stream.along(begun(kind, parts)):
        found = model(x)
    torch.testing.assert_close(found, written_out(x, model.model, kind, parts), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, model(x), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_pass_a_model_is_as_it_was(name):
    model, x = MODELS[name](), inputs(name)
    before = model(x)
    stream = Stream(model, anatomy(model))
    assert torch.equal(model(x), before)
    with stream.along(Pass()):
        assert torch.equal(model(x), before)
    assert not stream.running
    with pytest.raises(RuntimeError, match="inside"), stream.along(Pass()):
        raise RuntimeError("inside")
    assert not stream.running
    stream.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["added", "read"])
def test_at_the_start_nothing_changes_and_after_a_step_everything_trains(name, kind):
    model, x = MODELS[name](), inputs(name)
    before = model(x)
    parts = parts_of(kind)
    stream = Stream(model.requires_grad_(False), anatomy(model))
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    goal = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        with stream.along(begun(kind, parts)):
            found = model(x)
        if step == 0:
            assert torch.equal(found, before)
        optimizer.zero_grad()
        (found - goal).square().mean().backward()
        if step == 0:
            optimizer.step()
    sizes = [parameter.grad.norm().item() for parameter in parts.parameters()]
    assert min(sizes) > 1e-5 * max(sizes)  # and not what rounding leaves of a zero


def test_released_prompts_train_nothing_but_the_bias_of_their_normalisation():
    model, x = plain(), inputs("plain")
    parts = nn.ModuleList(Generator(TOKENS, LENGTH, WIDTH, zero=True) for _ in range(2))
    stream = Stream(model.requires_grad_(False), anatomy(model))
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    start = copy.deepcopy(parts.state_dict())
    for _ in range(4):
        with stream.along(Inserted(parts, LENGTH, 0.1)):
            found = model(x)
        optimizer.zero_grad()
        found.square().sum().backward()
        optimizer.step()
    moved = {name for name, value in parts.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"0.norm.bias"}  # behind the last block nothing reads its prompts


def test_threads_have_passes_of_their_own():
    model, x = plain(), inputs("plain")
    parts = drawn(adapters())
    stream = Stream(model, anatomy(model))
    found = {}
    gate = threading.Barrier(2)

    def run(name: str, one: Pass | None) -> None:
        gate.wait()
        for _ in range(20):
            if one is None:
                found[name] = model(x)
            else:
                with stream.along(Added(parts)):
                    found[name] = model(x)

    threads = [threading.Thread(target=run, args=given) for given in (("with", Pass()), ("without", None))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["without"], model(x))
    with stream.along(Added(parts)):
        assert torch.equal(found["with"], model(x))


def sections(name: str = "vit", **options) -> Sections:
    model = MODELS[name]()
    where = anatomy(model)
    tokens = tokens_of(model, where, inputs(name))
    assert tokens == TOKENS
    made = [
        Branch(lambda: drawn(Bottleneck(WIDTH, WIDTH, 4, "relu", 0.1, True, 0.5)), 2, Added),
        Branch(lambda: drawn(Gated(tokens, LENGTH, WIDTH)), 2, lambda parts: Read(parts, 0.1)),
    ]
    return Sections(model, where, made, **{"pretrained": True, **options})


def test_sections_are_passes_side_by_side():
    made, x = sections().eval(), inputs("vit")
    assert (made.count, made.width) == (3, WIDTH)
    drawn(made.branches[0].average, 0.2)
    found = made(x)
    assert found.shape == (4, 2, 3, WIDTH)
    assert torch.equal(found[:, 0, 0], made.backbone(x))
    assert torch.equal(found[:, 0, 0], found[:, 1, 0])
    for k, (branch, begin) in enumerate(zip(made.branches, (Added, lambda parts: Read(parts, 0.1)), strict=True)):
        for place, parts in ((1, branch.average), (2, branch.current)):
            with made.stream.along(begin(parts)):
                assert torch.equal(found[:, k, place], made.backbone(x))
    found[:, :, 2].sum().backward()
    assert all(parameter.grad is None for parameter in made.branches[0].average.parameters())
    assert all(parameter.grad is not None for parameter in made.branches[0].current.parameters())


@pytest.mark.parametrize("pretrained", [True, False])
def test_known_sections_are_taken_as_they_are(pretrained):
    made, x = sections(pretrained=pretrained).eval(), inputs("vit")
    drawn(made.branches[0].average, 0.2)
    found = made(x)
    assert torch.equal(made(x, found[:, :, :-1]), found)
    other = torch.randn_like(found[:, :, :-1])
    again = made(x, other)
    assert torch.equal(again[:, :, :-1], other)
    assert torch.equal(again[:, :, -1], found[:, :, -1])


@pytest.mark.parametrize("still", [True, False])
def test_only_what_trains_has_dropout_unless_told_otherwise(still):
    made, x = sections(still=still).train(), inputs("vit")
    first, second = made(x), made(x)
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert torch.equal(first[:, 0, 1], second[:, 0, 1]) == still
    assert not torch.equal(first[:, 0, 2], second[:, 0, 2])
    assert not made.backbone.training


@pytest.mark.parametrize("decay", [None, 0.8])
def test_running_means(decay):
    made = sections()
    seen = []
    for task in range(4):
        drawn(made.branches[0].current, 0.1 + task)
        drawn(made.branches[1].current, 0.2 * task + 0.1)
        seen.append([value.detach().clone() for value in made.branches[0].current.parameters()])
        made.fold(task, decay)
        weights = [0.8**task, *(0.2 * 0.8 ** (task - k) for k in range(1, task + 1))] if decay else [1 / (task + 1)] * 4
        for k, value in enumerate(made.branches[0].average.parameters()):
            mean = sum(weight * one[k] for weight, one in zip(weights, seen, strict=False))
            torch.testing.assert_close(value, mean)


def test_a_copy_has_passes_of_its_own():
    made, x = sections().eval(), inputs("vit")
    other = copy.deepcopy(made)
    drawn(other.branches[0].current, 0.9)
    assert not torch.allclose(other(x)[:, 0, 2], made(x)[:, 0, 2])
    assert torch.equal(other(x)[:, 0, 0], made(x)[:, 0, 0])


def test_what_does_not_fit():
    model = vit()
    where = anatomy(model)
    bare = [type(block)(**{**vars(block), "middle": None}) for block in where.blocks]
    with pytest.raises(ValueError, match=r"layers.0.*normalise before attention"):
        Stream(model, type(where)(tuple(bare)))
    stream = Stream(plain_model := plain(), anatomy(plain_model))
    with (
        stream.along(Read(drawn(nn.ModuleList(Gated(7, LENGTH, WIDTH) for _ in range(2))), 0.1)),
        pytest.raises(ValueError, match="5 tokens a sample; expected 7"),
    ):
        plain_model(inputs("plain"))
    assert width_of(model, where) == WIDTH
