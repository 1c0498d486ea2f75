"""The released merge of a projected and an unprojected training."""

import pytest
import torch

pytest.importorskip("transformers")

from tuned_models import hidden, inputs, small

from forgetcast.protect.halves import merge_halves
from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import protect
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.anatomy import Anatomy, Block
from forgetcast.tuners.prompt import Prompt


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_half_of_the_unprojected_step_survives():
    """Old states stay under the projected training alone, and move once the other half is mixed in."""
    tuned = Prompt(length=16).attach(small("vit"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.3)
    old, new = inputs("vit", 1), inputs("vit", 3, seed=9)
    projection = Projection(tuned.sites(), threshold=1.0).after(tuned.model, [old], hidden)
    before, pulls, ends = hidden(tuned.model, old).detach(), [], []

    def steps(term) -> None:
        optimizer = torch.optim.Adam(tuned.parameters(), lr=0.01)

        def run() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                loss = hidden(tuned.model, new).sin().square().mean()
                (loss if term is None else loss + 0.1 * term(new)).backward()
                optimizer.step()

        if term is None:
            with protect(optimizer, projection):
                run()
        else:
            pulls.append(float(term(new).detach()))
            run()
        ends.append({name: value.clone() for name, value in tuned.state().items()})

    def moved(share: float) -> float:
        tuned.load_state(start)
        merge_halves(tuned, lambda: steps(None), steps, lambda model, batch: hidden(model, batch).mean(1), share=share)
        return float((hidden(tuned.model, old).detach() - before).norm() / before.norm())

    start = {name: value.clone() for name, value in tuned.state().items()}
    assert moved(1.0) < 1e-9
    assert moved(0.5) > 1e-4
    projected, free = ends[-2:]
    assert all(torch.allclose(value, (projected[name] + free[name]) / 2) for name, value in tuned.state().items())
    assert min(pulls) > 0
    with pytest.raises(ValueError, match="share"):
        merge_halves(tuned, lambda: None, lambda _: None, share=1.5)


def test_the_pull_is_to_what_the_projected_training_ended_with():
    """The mean squared distance of features of unit length, at the start and with its gradient; none at that end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).double()
    tuned = Adapter(rank=2).attach(model, Anatomy((Block("", enter="0", leave="1"),)))
    batch, ends, parameters = torch.randn(7, 4, dtype=torch.float64), [], tuned.parameters()
    start = [parameter.detach().clone() for parameter in parameters]

    def unit(features: torch.Tensor) -> torch.Tensor:
        return features / features.norm(dim=1, keepdim=True)

    def step() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)

    def projected() -> None:
        step()
        ends.append(unit(model(batch)).detach())

    def free(pull) -> None:
        assert all(torch.equal(*pair) for pair in zip(parameters, start, strict=True))
        expected = (unit(model(batch)) - ends[0]).square().mean()
        assert pull(batch).item() == pytest.approx(expected.item())
        found, dense = (torch.autograd.grad(one, parameters) for one in (pull(batch), expected))
        assert all(torch.allclose(*pair) for pair in zip(found, dense, strict=True))
        step()
        assert pull(batch).item() == pytest.approx(0, abs=1e-30)

    merge_halves(tuned, projected, free, share=0.3)
