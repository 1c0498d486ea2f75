"""Projected steps leave old answers alone, whatever the optimiser; projected gradients do not."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import Restraint, protect
from forgetcast.protect.spaces import Basis
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.anatomy import Anatomy, Block
from forgetcast.tuners.base import Site, linear_sites

spaces = import_module("forgetcast.protect.spaces")  # an import would find fc.protect, the function
WIDTH, STEPS = 24, 200
OPTIMIZERS = {
    "momentum": lambda chosen: torch.optim.SGD(chosen, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda chosen: torch.optim.Adam(chosen, lr=0.01),
    "adamw": lambda chosen: torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.1),
}


class Stages(nn.Module):
    """Blocks x + f(norm(x)), whose outputs are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30), nn.GELU(), nn.Linear(30, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [x]
        for stage in self.stages:
            outputs.append(outputs[-1] + stage(outputs[-1]))
        return outputs[1:]


PARTS = Anatomy(tuple(Block(f"stages.{k}", f"stages.{k}.1", f"stages.{k}.3") for k in range(3)))


def task(seed: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def learn(model, parameters, inputs, optimizer, projection=None, target="step", clip=None) -> None:
    made = OPTIMIZERS[optimizer](parameters)
    goal = torch.randn(len(inputs), WIDTH, generator=torch.Generator().manual_seed(9))

    def steps() -> None:
        for _ in range(STEPS):
            made.zero_grad()
            (model(inputs)[-1] - goal).square().mean().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            made.step()

    if projection is None:
        steps()
    else:
        with protect(made, projection, target):
            steps()


def moved(model: nn.Module, inputs: Tensor, before: list[Tensor]) -> float:
    """Largest relative change of any block's output."""
    with torch.no_grad():
        return max(float((a - b).norm() / b.norm()) for a, b in zip(model(inputs), before, strict=True))


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return model(inputs)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("optimizer", "clip"), [(name, None) for name in OPTIMIZERS] + [("adamw", 0.1)])
def test_two_old_tasks_keep_every_blocks_outputs(optimizer, clip, bias):
    """In single precision, over hundreds of steps; without projection all of them move."""
    torch.manual_seed(0)
    model = Stages()
    tuned = Adapter(rank=20, bias=bias).attach(model, PARTS)
    learn(model, tuned.parameters(), task(1), optimizer)
    projection = Projection(tuned.sites(), threshold=1.0).after(model, [task(1)])
    first = outputs(model, task(1))
    learn(model, tuned.parameters(), task(2), optimizer, projection, clip=clip)
    assert moved(model, task(1), first) < 1e-5
    projection = projection.after(model, task(2).split(2))
    second = outputs(model, task(2))
    start = {name: value.clone() for name, value in tuned.state().items()}
    learn(model, tuned.parameters(), task(3), optimizer, projection, clip=clip)
    assert moved(model, task(1), first) < 1e-5
    assert moved(model, task(2), second) < 1e-5
    assert moved(model, task(3), outputs(model, task(4))) > 0
    tuned.load_state(start)
    learn(model, tuned.parameters(), task(3), optimizer, clip=clip)
    assert moved(model, task(1), first) > 1e-2
    assert moved(model, task(2), second) > 1e-2


def leak(optimizer: str, target: str) -> float:
    """Share of the way in old directions, where one linear layer learns."""
    torch.manual_seed(1)
    layer = nn.Linear(WIDTH, 7, bias=False).double()
    (site,) = linear_sites("layer", layer)
    old = task(1).double()
    projection = Projection((site,), threshold=1.0).after(layer, [old])
    start = layer.weight.detach().clone()
    made = OPTIMIZERS[optimizer](layer.parameters())
    draw = torch.Generator().manual_seed(3)
    with protect(made, projection, target):
        for _ in range(50):
            made.zero_grad()
            x = torch.randn(8, WIDTH, generator=draw, dtype=torch.float64)
            (layer(x) - x[:, :7].sin()).square().mean().backward()
            made.step()
    way = layer.weight.detach() - start
    basis = torch.linalg.qr(old.T).Q
    return float((way @ basis).norm() / way.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_stays_in_the_space_and_the_gradient_does_not_hold_it_there(optimizer):
    assert leak(optimizer, "step") < 1e-12
    assert leak(optimizer, "gradient") > (0.05 if "adam" in optimizer else 1e-4)


def test_strength_slows_old_directions():
    """By 1 - rho along them, not at all across them: of a plain step of gradient descent."""
    layer = nn.Linear(WIDTH, 4, bias=False).double()
    old, update = task(1).double(), task(2, 4).double()[None]
    (site,) = linear_sites("layer", layer)
    projection = Projection((site,), threshold=1.0, strength=0.7).after(layer, [old])
    found = projection.projected(site, update)
    basis = torch.linalg.qr(old.T).Q
    assert torch.allclose(found @ basis, 0.3 * update @ basis)
    assert torch.allclose(found - found @ basis @ basis.T, update - update @ basis @ basis.T)


def test_two_blends_shrink_free_and_old_directions_differently():
    """At eta = 0.97 and 700 free directions: 0.067 and 0.03 under NSP^2's normalisation, 1 and 0.03 without it."""
    width, free, eta = 768, 700, 0.97
    layer = nn.Linear(width, 1, bias=False, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    old = torch.randn(width - free, width, dtype=torch.float64, generator=draw)
    outside = torch.randn(1, width, dtype=torch.float64, generator=draw)
    inside = old.sum(0, keepdim=True)
    outside -= outside @ torch.linalg.pinv(old) @ old
    found = {}
    for blend in ("projector", "normalised"):
        projection = Projection(linear_sites("layer", layer), threshold=1.0, strength=eta, blend=blend)
        projection = projection.after(layer, [old])
        (site,) = projection.sites
        shrunk = [projection.projected(site, part[None]) for part in (outside, inside)]
        found[blend] = [
            float(part.norm() / given.norm()) for part, given in zip(shrunk, (outside, inside), strict=True)
        ]
        assert all(
            torch.allclose(part[0] / part.norm(), given / given.norm(), atol=1e-9)
            for part, given in zip(shrunk, (outside, inside), strict=True)
        )
    assert found["projector"] == pytest.approx([1.0, 0.03])
    assert found["normalised"] == pytest.approx([0.97 / free**0.5 + 0.03, 0.03])
    assert found["normalised"][1] / found["normalised"][0] == pytest.approx(0.45, abs=0.01)


def test_sites_with_rows_on_the_left_and_blocks_of_their_own():
    """S D = 0 for each block with its own rows."""
    rows = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(torch.randn(6, 12, dtype=torch.float64))
    layer = nn.Linear(6, 6, dtype=torch.float64)
    space = linear_sites("layer", layer)[0].right
    assert space is not None
    left = type(space)("rows", 6, 3, lambda seen: Once(seen, rows))
    projection = Projection((Site(("p",), (parameter,), blocks=3, left=left),), threshold=1.0).after(layer, [rows[0]])
    update = projection.projected(projection.sites[0], torch.randn(3, 6, 4, dtype=torch.float64))
    assert float((rows @ update).abs().max()) < 1e-12
    assert float(update.norm()) > 1
    swapped = rows[[1, 2, 0]] @ update
    assert float(swapped.abs().min(dim=0).values.max()) > 1e-3


class Once:
    """A context that shows some rows."""

    def __init__(self, seen, rows) -> None:
        self.seen, self.rows = seen, rows

    def __enter__(self) -> None:
        self.seen(self.rows[:, None])

    def __exit__(self, *_: object) -> None:
        pass


def test_exhausted_sites_are_named_and_stand_still():
    layer = nn.Linear(5, 3, bias=False)
    start = layer.weight.detach().clone()
    (site,) = linear_sites("up", layer)
    old = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for strength, moves in ((1.0, False), (0.9, True)):
        with pytest.warns(UserWarning, match=r"1 of 1 spaces have less than 10% .* up 0 of 5"):
            projection = Projection((site,), threshold=1.0, strength=strength).after(layer, [old])
        assert projection.table().iloc[0].tolist() == ["up", 5, 5, 0]
        made = torch.optim.Adam(layer.parameters(), lr=0.01)
        with protect(made, projection):
            layer(old).square().sum().backward()
            made.step()
        way = float((layer.weight.detach() - start).norm())
        assert (way > 1e-3) == moves
        assert way < 0.01


def test_state_is_taken_over_and_foreign_state_refused():
    layer, other = nn.Linear(6, 3, bias=False), nn.Linear(7, 3, bias=False)
    projection = Projection(linear_sites("layer", layer), threshold=1.0).after(layer, [torch.randn(2, 6)])
    again = Projection(projection.sites, threshold=1.0).with_state(projection.state_dict())
    update = torch.randn(1, 3, 6)
    assert torch.equal(again.projected(again.sites[0], update), projection.projected(projection.sites[0], update))
    with pytest.raises(ValueError, match=r"bases of layer of shape .* 1 of 7 rows"):
        Projection(linear_sites("layer", other), threshold=1.0).with_state(projection.state_dict())
    held = projection.state_dict()
    with pytest.raises(ValueError, match="which no site has"):
        again.with_state(held | {"bases": held["bases"] | {"another/0": held["bases"]["layer/0"]}})
    for wrong in (
        {"another/0": torch.eye(6)},
        {"layer/0": 2 * held["bases"]["layer/0"]},
        {"layer/0": torch.randn(6, 9)},
    ):
        with pytest.raises(ValueError, match="with orthonormal columns"):
            again.with_state(held | {"bases": wrong})
    assert again.with_state(Projection(projection.sites, threshold=1.0).state_dict()).table().empty
    for name, other_value in (("threshold", 0.9), ("strength", 0.5), ("energy", "sigma4")):
        settings = {"settings": held["settings"] | {name: other_value}}
        with pytest.raises(
            ValueError, match=f"a state saved with {name}={other_value!r} for a projection with {name}="
        ):
            again.with_state(held | settings)
    with pytest.raises(ValueError, match="a state saved with threshold=None"):
        again.with_state({})


@pytest.mark.parametrize("strength", [1.0, 0.3])
@given(rank=st.integers(0, 9), seed=st.integers(0, 100))
def test_the_smaller_of_basis_and_complement_gives_the_same(rank, seed, strength):
    """U - rho U L L^T, whichever is multiplied with; for blocks of different ranks too."""
    draw = torch.Generator().manual_seed(seed)
    ranks = (rank, (rank + 4) % 10)
    blocks = tuple(torch.linalg.qr(torch.randn(9, one, generator=draw, dtype=torch.float64)).Q for one in ranks)
    basis = Basis(blocks, 9)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        update = torch.randn(2, 5, 9, generator=draw, dtype=torch.float64).to(dtype)
        found = basis.removed(update, strength)
        pairs = zip(update.double(), blocks, strict=True)
        dense = torch.stack([one - strength * one @ block @ block.T for one, block in pairs])
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), dense, atol=tolerance, rtol=tolerance)


def test_a_site_is_restricted_from_either_side():
    """Also where the task has left nothing on the other one."""
    (inner,) = linear_sites("layer", nn.Linear(6, 6, bias=False))
    site = Site(("p",), inner.parameters, right=inner.right, left=replace(inner.right, name="left"))
    update = torch.randn(1, 6, 6, dtype=torch.float64)
    unit = torch.eye(6, dtype=torch.float64)[:, :1]
    expected = {"layer": update.clone(), "left": update.clone()}
    expected["layer"][..., 0], expected["left"][:, 0] = 0, 0
    for full, empty in (("layer", "left"), ("left", "layer")):
        projection = Projection((site,), known={full: Basis((unit,), 6), empty: Basis.empty(1, 6)})
        assert projection.restricts(site)
        torch.testing.assert_close(projection.projected(site, update), expected[full])


def test_a_missing_gradient_counts_as_zero_where_its_site_has_another():
    """A bias is one more column of its weight; a site without any gradient stays without."""
    layers = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    sites = [site for k in range(2) for site in linear_sites(str(k), layers[k])]
    old = torch.randn(2, 6, dtype=torch.float64)
    projection = Projection(tuple(sites), threshold=1.0)
    projection = projection.after(layers, [old], lambda _, rows: [layer(rows) for layer in layers])
    gradient = torch.randn(3, 6, dtype=torch.float64)
    layers[0].weight.grad = gradient.clone()
    Restraint(projection, sites).restrain_gradients()
    allowed = projection.projected(sites[0], torch.cat([gradient, torch.zeros(3, 1)], 1)[None])[0]
    torch.testing.assert_close(layers[0].weight.grad, allowed[:, :6])
    torch.testing.assert_close(layers[0].bias.grad, allowed[:, 6])
    assert layers[1].weight.grad is None
    assert layers[1].bias.grad is None


def test_what_moves_while_nothing_is_held_stays_moved():
    layer = nn.Linear(6, 3, bias=False)
    (site,) = linear_sites("layer", layer)
    restraint = Restraint(Projection((site,), threshold=1.0).after(layer, [torch.randn(2, 6)]), [site])
    restraint.hold()
    restraint.release()
    with torch.no_grad():
        layer.weight.add_(1.0)
    before = layer.weight.detach().clone()
    restraint.release()
    assert torch.equal(layer.weight, before)


def test_half_precision_weights_are_rounded_once():
    """What a bfloat16 weight ends at is the nearest to its start plus the projected step of the optimiser."""
    layer = nn.Linear(WIDTH, 7, bias=False).bfloat16()
    (site,) = linear_sites("layer", layer)
    projection = Projection((site,), threshold=1.0).after(layer, [task(1).bfloat16()])
    start = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def stepped() -> Tensor:
        with torch.no_grad():
            layer.weight.copy_(start)
        layer.weight.grad = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        optimizer.step()
        return layer.weight.detach().double()

    exact = start.double() + projection.projected(site, (stepped() - start)[None])[0]
    with protect(optimizer, projection):
        gap = (stepped() - exact).abs()
    assert (gap <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-7).all()


def test_factors_are_made_once_for_all_steps(monkeypatch):
    layer = nn.Linear(WIDTH, 7)
    projection = Projection(linear_sites("layer", layer), threshold=1.0).after(layer, [task(1)])
    made = []
    stacked = spaces._stacked
    monkeypatch.setattr(spaces, "_stacked", lambda blocks: made.append(1) or stacked(blocks))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        with protect(optimizer, projection):
            for _ in range(3):
                layer(task(2)).square().sum().backward()
                optimizer.step()
    assert len(made) == 1


def test_a_gate_that_stands_still_is_no_reason_to_warn():
    gate = nn.Linear(1, 3, bias=False)
    projection = Projection(linear_sites("gate", gate), threshold=1.0).after(gate, [torch.ones(4, 1)])
    assert projection.table()["free"].tolist() == [0]


def test_a_parameter_at_two_sites_is_refused():
    one, other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    other.weight = one.weight
    with pytest.raises(ValueError, match="one parameter as one.weight and as other.weight"):
        Projection((*linear_sites("one", one), *linear_sites("other", other)))
