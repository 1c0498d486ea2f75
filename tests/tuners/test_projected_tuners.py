"""Projection through whole transformers: old answers stay in every block, whichever tuner trains."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tuned_models import IMAGES, inputs, small

from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import protect
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt

TUNERS = {
    "adapter": Adapter(rank=20),
    "LoRA": LoRA(rank=20, targets=("query", "key", "value", "enter", "leave")),
    "prefix": Prefix(length=32),
    "prompt": Prompt(length=32),
}
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
}
CASES = [("vit", name, optimizer) for name in TUNERS for optimizer in ("momentum", "Adam")]
CASES += [("bert", name, "AdamW") for name in TUNERS]
CASES += [("gpt2", name, "AdamW") for name in ("LoRA", "prompt")]
CASES += [("llama", name, "AdamW") for name in ("prefix", "prompt")]  # grouped queries, RMSNorm
STEPS = {"vit": 200}
OTHERWISE = 120


def batch(kind: str, seed: int) -> dict[str, torch.Tensor]:
    found = inputs(kind, 1 if kind == "llama" else 2, seed)
    return {name: value.float() if kind in IMAGES else value for name, value in found.items()}


def states(model: torch.nn.Module, kind: str, seed: int) -> tuple[torch.Tensor, ...]:
    return model(**batch(kind, seed), output_hidden_states=True).hidden_states


def learn(model, parameters, kind: str, seed: int, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        states(model, kind, seed)[-1].sub((-1) ** seed).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.filterwarnings("ignore:.*of their directions free")
@pytest.mark.parametrize(("kind", "name", "optimizer"), CASES)
def test_old_hidden_states_stay(kind, name, optimizer):
    """To 1e-5 relative in single precision after many clipped steps; unprojected they move by percents in a third."""
    steps = STEPS.get(kind, OTHERWISE)
    model = small(kind).float()
    tuned = TUNERS[name].attach(model)
    parameters, made = tuned.parameters(), OPTIMIZERS[optimizer]
    learn(model, parameters, kind, 2, made(parameters), 20)
    with torch.no_grad():
        before = states(model, kind, 1)
    projection = Projection(tuned.sites(), threshold=1.0).after(
        model, [batch(kind, 1)], lambda found, given: found(**given)
    )
    start = {key: value.clone() for key, value in tuned.state().items()}

    def moved() -> list[float]:
        with torch.no_grad():
            pairs = zip(states(model, kind, 1)[1:], before[1:], strict=True)
            return [float((after - state).norm() / state.norm()) for after, state in pairs]

    protected = made(parameters)
    with protect(protected, projection):
        learn(model, parameters, kind, 3, protected, steps)
    assert max(moved()) < 1e-5
    assert max(float((tuned.state()[key] - value).abs().max()) for key, value in start.items()) > 1e-3
    tuned.load_state(start)
    learn(model, parameters, kind, 3, made(parameters), steps // 3)
    assert min(moved()) > 1e-2
