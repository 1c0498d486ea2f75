"""What every tuner owes: nothing changes at first, all of it trains, its sites tell the truth, it comes out again."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tuned_models import KINDS, hidden, inputs, moments, small  # noqa: E402 - these import transformers

from forgetcast.tuners.adapter import Adapter  # noqa: E402
from forgetcast.tuners.base import Tuned  # noqa: E402
from forgetcast.tuners.lora import LoRA  # noqa: E402
from forgetcast.tuners.prefix import Prefix  # noqa: E402
from forgetcast.tuners.prompt import Prompt  # noqa: E402

TUNERS = {
    "parallel adapter": Adapter(rank=20),
    "sequential adapter": Adapter(rank=20, place="sequential", activation="relu", scale=0.5, layers=[-1]),
    "adapter with biases": Adapter(rank=20, bias=True),
    "LoRA": LoRA(rank=20),
    "LoRA everywhere": LoRA(rank=20, targets=("query", "key", "value", "enter", "leave"), alpha=10, layers=[0]),
    "prefix": Prefix(length=16),
    "prefix without a gate": Prefix(length=16, gated=False, layers=[-1]),
    "prompt": Prompt(length=24),
    "shallow prompt": Prompt(length=3, depth="shallow"),
    "prompt behind the normalisation": Prompt(length=24, normalised=False),
}
VARIATIONS = ("sequential adapter", "adapter with biases", "LoRA everywhere", "prefix without a gate")
CASES = [(kind, name) for kind in KINDS for name in TUNERS if name not in VARIATIONS]
CASES += [(kind, name) for kind in ("bert", "gpt2", "fused") for name in VARIATIONS]
IDENTICAL = [(kind, name) for kind, name in CASES if name != "prefix without a gate"]
PRE_NORM = {"vit", "deit", "dinov2", "clip", "gpt2", "llama", "gpt_neox", "fused"}
EXACT = [
    (kind, name) for kind, name in CASES if name != "shallow prompt" and (name != "prompt" or kind not in PRE_NORM)
]


def trained(tuned: Tuned, kind: str, steps: int = 2) -> dict[str, float]:
    """Largest gradient that each parameter has seen in a few steps on some task."""
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    seen = dict.fromkeys(tuned.named_parameters(), 0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        hidden(tuned.model, inputs(kind, 4, seed=5)).sin().square().mean().backward()
        for name, parameter in tuned.named_parameters().items():
            seen[name] = max(seen[name], float(parameter.grad.abs().max()))
        optimizer.step()
    return seen


@pytest.mark.parametrize(("kind", "name"), IDENTICAL)
def test_nothing_changes_at_first_and_all_of_it_trains(kind, name):
    model = small(kind)
    before = hidden(model, inputs(kind, 3)).detach()
    names = [key for key, _ in model.named_parameters()]
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = TUNERS[name].attach(model)
    assert float((hidden(model, inputs(kind, 3)).detach() - before).abs().max()) < 1e-12
    training = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert training == {id(parameter) for parameter in tuned.parameters()}
    assert set(tuned.named_parameters()) <= {key for key, _ in model.named_parameters()}
    assert min(trained(tuned, kind).values()) > 0
    moved = hidden(model, inputs(kind, 3)).detach()
    assert float((moved - before).norm()) > 1e-6 * float(before.norm())
    assert tuned.detach() is model
    assert [key for key, _ in model.named_parameters()] == names
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items())
    assert torch.equal(hidden(model, inputs(kind, 3)), before)


@pytest.mark.parametrize(("kind", "name"), EXACT)
def test_updates_that_vanish_on_the_rows_of_their_sites_change_no_old_output(kind, name):
    """Through all depths; an update of the same size that does not vanish there changes them."""
    tuned = TUNERS[name].attach(small(kind))
    trained(tuned, kind)
    sites = tuned.sites()
    assert sorted(key for site in sites for key in site.names) == sorted(tuned.named_parameters())
    old, spaces = inputs(kind, 1), {space for site in sites for space in (site.right, site.left) if space is not None}
    free: dict = {}
    with torch.no_grad():
        before = hidden(tuned.model, old)
    for space in spaces:
        found = moments(space, tuned.model, old)
        assert found.shape == (space.blocks, space.width, space.width)
        free[space] = torch.stack([null_space(block) for block in found])
    start = {key: value.clone() for key, value in tuned.state().items()}

    def drift(project: bool) -> float:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for site in sites:
                update = 0.1 * torch.randn(site.matrix().shape, generator=draw, dtype=torch.float64)
                if project:
                    update = update @ free[site.right] if site.right is not None else update
                    update = free[site.left] @ update if site.left is not None else update
                for parameter, part in zip(site.parameters, site.split(site.matrix() + update), strict=True):
                    parameter.copy_(part)
            moved = max(float((tuned.state()[key] - value).abs().max()) for key, value in start.items())
            after = hidden(tuned.model, old)
            tuned.load_state(start)
        assert moved > 1e-3
        return float((after - before).norm() / before.norm())

    assert drift(project=True) < 1e-10
    assert drift(project=False) > 1e-3


def null_space(moment: torch.Tensor) -> torch.Tensor:
    """The projector onto all that rows of these second moments are orthogonal to."""
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, values <= 1e-13 * values[-1]]
    return basis @ basis.T


@pytest.mark.parametrize(("kind", "name"), [("vit", name) for name in TUNERS] + [("gpt2", "LoRA")])
def test_saved_and_loaded(kind, name, tmp_path):
    tuned = TUNERS[name].attach(small(kind))
    trained(tuned, kind)
    expected = hidden(tuned.model, inputs(kind, 3))
    tuned.save(tmp_path)
    other = TUNERS[name].attach(small(kind))
    other.load(tmp_path)
    assert torch.equal(hidden(other.model, inputs(kind, 3)), expected)
    with pytest.raises(ValueError, match="expected a folder that"):
        other.load(tmp_path / "nowhere")
    other.detach()
    with pytest.raises(ValueError, match=r"in no model any more.*Save before detach"):
        other.save(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_parameters_of_another_tuner_change_nothing(tmp_path):
    tuned = Adapter(rank=3).attach(small("vit"))
    tuned.save(tmp_path)
    for options in (Adapter(rank=4), Adapter(rank=3, scale=2.0)):
        other = options.attach(small("vit"))
        before = {key: value.clone() for key, value in other.state().items()}
        with pytest.raises(ValueError, match=r"holds .*Adapter.*rank.*3.*expected .*Adapter"):
            other.load(tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in other.state().items())
    with pytest.raises(ValueError, match=r"differs in .*expected the 4 parameters"):
        tuned.load_state({})
    with pytest.raises(ValueError, match="merging a TunedByAdapters"):
        tuned.merge()


def test_what_trained_before_trains_again_and_a_second_tuner_is_refused():
    model = small("vit")
    model.layernorm.requires_grad_(False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for options in TUNERS.values():
        tuned = options.attach(model)
        with pytest.raises(ValueError, match="a model with a tuner in place"):
            Adapter().attach(model)
        tuned.detach()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("name", ["parallel adapter", "sequential adapter"])
def test_adapters_compute_their_formula(name):
    """Beside or behind the feed-forward network of a block, from its own input or its output."""
    options = TUNERS[name]
    model = small("fused")
    tuned = options.attach(model)
    trained(tuned, "fused")
    block = model.blocks[-1]
    part = block.mlp[2].adapter
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    block_input = x + block.attn(block.norm1(x))
    inner = block.norm2(block_input)
    frozen = torch.nn.functional.linear(block.mlp[1](block.mlp[0](inner)), block.mlp[2].weight, block.mlp[2].bias)
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[options.activation]
    given = inner if options.place == "parallel" else frozen
    added = options.scale * act(given @ part.down.weight.T) @ part.up.weight.T
    assert torch.allclose(block(x), block_input + frozen + added, atol=1e-12)


@pytest.mark.parametrize("name", TUNERS)
def test_a_copy_of_the_model_has_a_tuner_of_its_own(name):
    tuned = TUNERS[name].attach(small("vit"))
    trained(tuned, "vit")
    other = copy.deepcopy(tuned.model)
    before = hidden(other, inputs("vit", 2)).detach()
    assert torch.equal(before, hidden(tuned.model, inputs("vit", 2)))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(2)
    assert torch.equal(before, hidden(other, inputs("vit", 2)))
    assert not torch.allclose(before, hidden(tuned.model, inputs("vit", 2)))


def test_a_copy_after_an_error_is_a_copy():
    tuned = Adapter(rank=3).attach(small("vit"))
    handle = tuned.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden(tuned.model, inputs("vit", 1))
    handle.remove()
    other = copy.deepcopy(tuned.model)
    assert torch.equal(hidden(other, inputs("vit", 1)), hidden(tuned.model, inputs("vit", 1)))


def test_files_know_no_difference_between_lists_and_tuples(tmp_path):
    Adapter(rank=3, layers=[0, 1]).attach(small("vit")).save(tmp_path)
    Adapter(rank=3, layers=(0, 1)).attach(small("vit")).load(tmp_path)
    Adapter(rank=3).attach(small("vit")).load(tmp_path)
