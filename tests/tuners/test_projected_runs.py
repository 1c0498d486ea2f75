"""Projected class-incremental runs of every tuner: what is frozen stays, answers know nothing of other test samples."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tuned_models import WIDTH, hidden, inputs, moments, small

from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Model
from forgetcast.methods.pegp import PEGP
from forgetcast.modes import evaluating
from forgetcast.protect.projection import Projection
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt

TUNERS = {"adapter": Adapter(rank=8), "LoRA": LoRA(rank=8), "prefix": Prefix(length=8), "prompt": Prompt(length=8)}


class Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small("vit").float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hidden(self.network, {"pixel_values": x}).mean(1)


def source() -> Source:
    labels = torch.arange(48) % 4
    images = inputs("vit", 48)["pixel_values"] + 2 * inputs("vit", 4, seed=1)["pixel_values"][labels]
    return Source("images", images.float().numpy(), labels.numpy())


@pytest.mark.filterwarnings("ignore:.*of their directions free")
@pytest.mark.parametrize("name", TUNERS)
def test_frozen_parameters_stay_and_answers_stand_alone(name):
    backbone = Backbone()
    tuned = TUNERS[name].attach(backbone.network)
    frozen = {key: value.clone() for key, value in backbone.named_parameters() if not value.requires_grad}
    start = {key: value.clone() for key, value in tuned.state().items()}
    method = PEGP(Model(backbone, Linear(WIDTH)), threshold=0.6)
    stream = class_incremental(source(), 2, seed=0)
    done = learn(method, stream, Optimization("adamw", 0.01, epochs=4, batch_size=8), seed=0)
    assert all(torch.equal(value, frozen[key]) for key, value in backbone.named_parameters() if key in frozen)
    assert all(not torch.equal(value, start[key]) for key, value in tuned.state().items())
    places = [place for task in stream.tasks for place in task.test.tolist()]
    x, y = torch.from_numpy(stream.source.inputs[places]), torch.from_numpy(stream.outputs[places])
    with torch.no_grad(), evaluating(method.model):
        whole = method.predict(x)
        for seed, size in ((0, 1), (1, 3), (2, 7)):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            parts = torch.cat([method.predict(some) for some in x[order].split(size)])
            assert torch.allclose(parts, whole[order], atol=1e-5)
            assert torch.equal(parts.argmax(1), whole[order].argmax(1))
    share = float((whole.argmax(1) == y).double().mean())
    sizes = [len(task.test) for task in stream.tasks]
    own = sum(a * n for a, n in zip(done.accuracy_matrix[-1], sizes, strict=True)) / sum(sizes)
    assert share == pytest.approx(own)


@pytest.mark.filterwarnings("ignore:.*of their directions free")
@pytest.mark.parametrize("threshold", [0.5, 0.9])
@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_of_each_old_tasks_energy_no_more_passes_than_the_threshold_leaves(name, threshold, kind):
    """At every site, on its own side, for the first task too after the second; without projection all of it passes."""
    tuned = TUNERS[name].attach(small(kind))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    projection = Projection(tuned.sites(), threshold=threshold)
    tasks = [inputs(kind, 3, seed=seed) for seed in (1, 2)]
    for task in tasks:
        shards = [{key: value[part] for key, value in task.items()} for part in (slice(0, 1), slice(1, 3))]
        one, other = (projection.moments(tuned.model, [shard], hidden) for shard in shards)
        projection = projection.grown({name: one[name] + other[name] for name in one})
    passed = []
    for task in tasks:
        for site in projection.sites:
            for space in filter(None, (site.right, site.left)):
                found = moments(space, tuned.model, task)
                basis = projection.known[space.name]
                kept = basis.removed(basis.removed(found, 1.0).mT, 1.0)
                passed.append(kept.diagonal(dim1=1, dim2=2).sum(1) / found.diagonal(dim1=1, dim2=2).sum(1))
    assert float(torch.cat(passed).max()) <= 1 - threshold + 1e-9
    assert float(torch.cat(passed).max()) > 0
    with pytest.raises(ValueError, match=r"moments of 0 spaces, which differ in .*expected of the \d+ of the sites"):
        projection.grown({})
