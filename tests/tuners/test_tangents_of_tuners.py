"""Per-sample gradients of every tuner's parameters go by rules, and are those of autograd sample by sample."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tuned_models import IMAGES, hidden, inputs, small

from forgetcast.tangent.jacobian import jacobian
from forgetcast.tangent.survey import survey
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt

TUNERS = {
    "adapter": Adapter(rank=3),
    "LoRA": LoRA(rank=3),
    "prefix": Prefix(length=3),
    "prompt": Prompt(length=3),
    "shallow prompt": Prompt(length=3, depth="shallow"),
}


class Pooled(torch.nn.Module):
    """Mean of the last hidden states, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network = small(kind)
        self.key = "pixel_values" if kind in IMAGES else "x" if kind == "fused" else "input_ids"
        self.head = torch.nn.Linear(48 if kind == "llama" else 24, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(hidden(self.network, {self.key: x}).mean(1))


@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "gpt2", "fused"])
@pytest.mark.parametrize("name", TUNERS)
def test_rules_cover_tuners(kind, name):
    torch.manual_seed(0)
    model = Pooled(kind)
    tuned = TUNERS[name].attach(model.network)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    (x,) = inputs(kind, 4).values()
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    found = survey(model, x, parameters, lambda outputs, _: outputs)
    assert (found.vectorised, found.looped, found.unreached) == ((), (), ())
    rows = jacobian(model, x, parameters)
    for i in range(4):
        for c in range(3):
            expected = torch.autograd.grad(model(x[i : i + 1])[0, c], list(parameters.values()))
            assert torch.allclose(rows[i, c], torch.cat([part.flatten() for part in expected]), atol=1e-10)
