"""The forecast of a projected training: the run itself at full budget, and less forgetting than without projection."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tuned_models import hidden, inputs, small

import forgetcast as fc
from forgetcast.protect.projection import Projection
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt
from forgetcast.tuners.sites import sites_of

TUNERS = {"adapter": Adapter(rank=6), "LoRA": LoRA(rank=6), "prefix": Prefix(length=16), "prompt": Prompt(length=16)}
TRAINING = fc.AdamW(learning_rate=0.01, steps=12, batch_size=8, seed=3)


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small("vit")
        self.head = torch.nn.Linear(24, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(hidden(self.network, {"pixel_values": x}).mean(1))


def learnt(name: str):
    """A model that has learnt two classes with a tuner, what it has to remember, and the new classes."""
    torch.manual_seed(0)
    model = Classifier()
    TUNERS[name].attach(model.network)
    means = 0.5 * torch.randn(4, 3, 16, 16, dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave(16)
    x = means[labels] + 0.3 * inputs("vit", 64, seed=1)["pixel_values"]
    old, new = (x[:32], labels[:32]), (x[32:], labels[32:])
    run(model, old, None)
    projection = Projection(sites_of(model), threshold=0.9).after(model, [old[0]])
    return model, old, new, projection


def run(model, data, projection) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = TRAINING.optimizer(parameters)

    def steps() -> None:
        for batch in order():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()

    if projection is None:
        steps()
    else:
        with fc.protect(optimizer, projection):
            steps()


def order():
    from forgetcast.forecast.simulate import batches

    drawn = batches(TRAINING, 32)
    return [next(drawn) for _ in range(TRAINING.steps)]


@pytest.mark.filterwarnings("ignore:.*of their directions free")
@pytest.mark.parametrize("name", TUNERS)
def test_at_full_budget_the_forecast_is_the_projected_run(name):
    model, old, new, projection = learnt(name)
    found = {
        estimator: fc.forecast(
            model, old, new, TRAINING, restraint=projection.restrained, budget=3.0, estimator=estimator
        )
        for estimator in ("anchored", "pilot")
    }
    free = fc.forecast(model, old, new, TRAINING, budget=3.0)
    with torch.no_grad():
        before = model(old[0])
    run(model, new, projection)
    with torch.no_grad():
        drift = model(old[0]) - before
    for forecast in found.values():
        assert torch.allclose(forecast.drift, drift, atol=1e-9)
    assert float((free.drift - drift).norm()) > 1e-2 * float(drift.norm())


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_closed_forms_have_no_steps_to_restrain():
    model, old, new, projection = learnt("adapter")
    inner = Projection(sites_of(model.network), threshold=0.9)
    with pytest.raises(ValueError, match=r"none of them at a site.*fc.sites_of\(model\) with the very model"):
        fc.forecast(model, old, new, TRAINING, restraint=inner.restrained, budget=0.9)
    with pytest.raises(ValueError, match="estimator='static' with a restraint of steps"):
        fc.forecast(model, old, new, TRAINING, restraint=projection.restrained, estimator="static")
    seen = fc.forecast(model, old, new, TRAINING, restraint=projection.restrained, budget=0.9)
    assert seen.settings["restraint"]
    assert float(seen.what_if(steps=6).drift.norm()) > 0
