"""NTK-CL as corrected: it starts as the pretrained model, all of it trains, and each way can be chosen alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from digit_tasks import task_of
from small import stream
from torch.nn.functional import normalize
from tuned import Transformer

from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch, TaskData
from forgetcast.methods.ntk_cl import NTKCL, Ways
from forgetcast.modes import evaluating
from forgetcast.protect.memory import task_features
from forgetcast.protect.orthogonal import old_basis
from forgetcast.streams.scenarios import class_incremental
from forgetcast.streams.sources import Source
from forgetcast.tangent.blocks import TaskKernels

WIDTH = 20
OPTIMIZATION = Optimization("sgd", learning_rate=0.05, epochs=3, batch_size=32, momentum=0.9)
PARTS = ("prompts", "fusion", "contrast", "orthogonality", "averaging", "proxies", "prototypes")


def method(**options) -> NTKCL:
    torch.manual_seed(4)
    return NTKCL(Transformer(WIDTH), WIDTH, **{"prompts": 2, "rank": 16, "dropout": 0.0, "tasks": 3} | options)


@pytest.mark.parametrize("pretrained", [False, True])
def test_every_feature_is_at_first_that_of_the_pretrained_model(pretrained):
    made, task = method(pretrained=pretrained), task_of(0)
    (batch, *_) = task.batches()
    plain = made.network.backbone(batch.inputs)
    made.begin_task(task)
    sections = made.network.sections(batch.inputs)
    assert sections.shape[1:3] == (2, 2 + pretrained)
    for found in (*sections.flatten(1, 2).unbind(1), *made.network.fusion(sections).unbind(1)):
        assert torch.equal(found, plain)


class Pooled(Transformer):
    """Features are means over all tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.unflatten(1, (-1, 8)))
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


@pytest.mark.parametrize(("backbone", "alone"), [(Transformer, True), (Pooled, False)])
def test_the_last_network_takes_the_first_token_alone_where_features_read_no_other(backbone, alone):
    task = task_of(0)
    (batch, *_) = task.batches()
    torch.manual_seed(4)
    plain = backbone(WIDTH)
    expected = plain(batch.inputs)
    made = NTKCL(plain, WIDTH, prompts=2, rank=16, dropout=0.0, tasks=3)
    made.begin_task(task)
    assert made.network.first_token is made.network.sections.first_token is alone
    for found in made.network.sections(batch.inputs).flatten(1, 2).unbind(1):
        torch.testing.assert_close(found, expected)
    again = NTKCL(backbone(WIDTH), WIDTH, prompts=2, rank=16, dropout=0.0, tasks=3)
    again.load_state_dict(made.state_dict())
    assert again.network.first_token is again.network.sections.first_token is alone


def test_after_one_step_everything_has_a_gradient():
    made, task = method(), task_of(0)
    made.begin_task(task)
    made.model.double().train()
    optimizer = torch.optim.SGD(made.parameter_groups(), lr=0.1)
    for batch, _ in zip(task.batches(), range(2), strict=False):
        optimizer.zero_grad()
        made.loss(Batch(batch.inputs.double(), batch.labels, batch.indices)).backward()
        optimizer.step()
    sizes = {name: value.grad.norm().item() for name, value in made.model.named_parameters() if value.requires_grad}
    assert min(sizes.values()) > 1e-10 * max(sizes.values()), sizes  # rounding leaves 1e-16 of a zero
    with torch.device("meta"):
        fusion = type(made.network.fusion)(768, made.fusion_rank)
    assert sum(parameter.numel() for parameter in fusion.parameters()) < 300_000


def test_a_step_makes_two_passes_with_a_gradient_and_two_without(monkeypatch):
    made = method()
    bases, passes = [], []

    def counted(prototypes, **options):
        bases.append(len(prototypes))
        return old_basis(prototypes, **options)

    monkeypatch.setattr("forgetcast.methods.ntk_cl.old_basis", counted)
    for index in range(2):
        task = task_of(index)
        made.begin_task(task)
        made.network.sections.backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        for batch in task.batches():
            passes.clear()
            made.loss(batch)
            assert sorted(passes) == [False] * (2 * (index + 1)) + [True] * (2 * (index + 1))  # a hook more each task
        made.end_task(task)
    assert bases == [0, 2]


@pytest.mark.parametrize("pretrained", [False, True])
def test_what_stands_still_in_a_task_is_read_once_where_samples_are_not_augmented(pretrained):
    """Loss and gradients are those of the passes that are left out; samples that are not the task's make them."""
    made, passes = method(pretrained=pretrained), []
    made.begin_task(task_of(0))
    made.end_task(task_of(0))
    task = task_of(1)
    made.begin_task(replace(task, augmented=False))
    made.network.sections.backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    batch = list(task.batches())[1]
    mixed = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(0))
    batch = Batch(batch.inputs[mixed], batch.labels[mixed], batch.indices[mixed])

    def found() -> list[torch.Tensor]:
        passes.clear()
        made.model.zero_grad()
        loss = made.loss(batch)
        loss.backward()
        return [loss.detach(), *(value.grad.clone() for value in made.model.parameters() if value.grad is not None)]

    short = found()
    assert passes == [True, True]
    other = Batch(batch.inputs, batch.labels, batch.indices + 10**6)
    made.loss(other)
    assert passes.count(False) == 2 + pretrained
    kept, made.began = made.began, {}
    long = found()
    assert sorted(passes) == [False] * (2 + pretrained) + [True] * 2
    torch.testing.assert_close(short, long)
    made.began = kept
    state = made.state_dict()
    again = method(pretrained=pretrained)
    again.load_state_dict(state)
    assert torch.equal(again.began["standing"], kept["standing"])
    made.end_task(task)
    assert made.began == {}
    plain = method(pretrained=pretrained)
    plain.begin_task(replace(task_of(0), augmented=True))
    assert "standing" not in plain.began
    dropped = method(pretrained=pretrained, ways={"averaging": "released"})
    dropped.begin_task(replace(task_of(0), augmented=False))
    assert "standing" not in dropped.began


def test_the_transformer_stands_still_and_the_mean_is_over_all_tasks():
    made = method(recipe="corrected", tasks=None)
    before = {name: value.clone() for name, value in made.network.backbone.state_dict().items()}
    ends = []
    for count in (1, 2, 3):
        made = method(tasks=None)
        learn(made, stream(), OPTIMIZATION, seed=2, until=count)
        ends.append(
            [value.clone() for branch in made.network.sections.branches for value in branch.current.parameters()]
        )
    after = made.network.sections.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    means = [value for branch in made.network.sections.branches for value in branch.average.parameters()]
    for mean, *values in zip(means, *ends, strict=True):
        torch.testing.assert_close(mean, sum(values) / 3)
    assert all(not torch.equal(a, b) for first, second in pairwise(ends) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_each_way_can_be_chosen_alone(part):
    """One part as released changes the run, and nothing else is then as released."""
    plain, one = method(), method(ways={part: "released"})
    assert one.ways == Ways(**{part: "released"})
    ends = []
    for made in (plain, one):
        learn(made, stream(), OPTIMIZATION, seed=2, until=3)
        places = stream()[0].test
        ends.append(made.predict(torch.from_numpy(stream().source.inputs[places])))
    assert not torch.equal(*ends)
    back = method(recipe="released", ways={name: "corrected" for name in PARTS if name != part})
    assert back.ways == one.ways


@pytest.mark.usefixtures("unchecked_types")
def test_orthogonality_takes_energy_out_of_the_kernel_between_tasks():
    """Of adapters at every seed; of prompts, which answer with large steps, in the mean (13 of 18 seeds tried)."""

    def energies(seed: int, weight: float) -> torch.Tensor:
        torch.manual_seed(seed)
        options = {"prompts": 2, "rank": 16, "dropout": 0.0, "orthogonality": weight}
        made = NTKCL(Transformer(WIDTH), WIDTH, **options)
        learn(made, stream(), replace(OPTIMIZATION, epochs=10), seed=seed, until=2)
        inputs = [torch.from_numpy(stream().source.inputs[task.train]) for task in stream().tasks[:2]]
        with torch.no_grad(), evaluating(made.model):
            features = [made.network.three(part)[:2] for part in inputs]
        kernels = [TaskKernels.of_features([f[k][:, WIDTH:] for f in features], bias=False) for k in range(2)]
        return torch.stack([kernel.matrix(0, 1).square().mean() for kernel in kernels])

    change = torch.stack([(energies(seed, 0.3) / energies(seed, 0.0)).log() for seed in range(4)])
    assert (change[:, 0] < 0).all()
    assert change[:, 1].mean() < -0.1


def test_proxies_start_at_the_class_means_of_the_features_as_they_are():
    made = method(tasks=None)
    learn(made, stream(), OPTIMIZATION, seed=2, until=1)
    task = task_of(1)
    features, labels = task_features(made.model, task)
    made.begin_task(task)
    means = torch.stack([features[labels == output].double().mean(0) for output in task.classes])
    torch.testing.assert_close(made.network.proxy.weight.double(), normalize(means), atol=1e-6, rtol=0)
    assert made.network.proxy.scale.item() == 20.0
    assert made.network.proxy.weight.requires_grad
    plain = method(tasks=None, ways={"proxies": "released"})
    learn(plain, stream(), OPTIMIZATION, seed=2, until=1)
    plain.begin_task(task)
    assert plain.network.proxy.scale.item() == 1.0
    bound = plain.network.proxy.weight.shape[1] ** -0.5
    assert 0.9 * bound < plain.network.proxy.weight.abs().max() <= bound
    chosen = method(proxy_scale=7.0)
    chosen.begin_task(task)
    assert chosen.network.proxy.scale.item() == 7.0


def test_a_class_without_a_sample_has_a_proxy_with_a_direction():
    task = task_of(0)

    def batches():
        for batch in task.batches():
            own = batch.labels == task.classes[0]
            yield Batch(batch.inputs[own], batch.labels[own], batch.indices[own])

    made = method()
    made.begin_task(replace(task, batches=batches))
    assert made.network.proxy.weight.norm(dim=1).min() > 0.1
    made.loss(next(batches())).backward()
    assert all(value.grad.isfinite().all() for value in made.model.parameters() if value.requires_grad)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("seed", range(3))
def test_old_means_follow_the_drift(seed):
    """What they miss of the means of old samples now, beside what they miss where they stay: the same network."""
    found = []
    for way in ("corrected", "released"):
        torch.manual_seed(seed)
        made = NTKCL(Transformer(WIDTH), WIDTH, prompts=2, rank=16, dropout=0.0, ways={"prototypes": way})
        learn(made, stream(), OPTIMIZATION, seed=seed, until=2)
        features, labels = task_features(made.model, task_of(0))
        means = made.model.head.means
        found.append([features[labels == c].double().mean(0) - means[c] for c in task_of(0).classes])
        found[-1] = torch.stack(found[-1]).norm()
        assert made.began == {}
        new, own = task_features(made.model, task_of(1))
        for c in task_of(1).classes:
            torch.testing.assert_close(means[c], new[own == c].double().mean(0))
    assert found[0] < 0.8 * found[1]


def test_tasks_of_unequal_sizes():
    source = stream().source
    kept = (source.labels < 5).nonzero()[0]
    tasks = class_incremental(Source("digits", source.inputs[kept], source.labels[kept]), 2, base=3, seed=1)
    assert [len(task.classes) for task in tasks.tasks] == [3, 2]
    for recipe in ("corrected", "released"):
        made = method(recipe=recipe)
        done = learn(made, tasks, OPTIMIZATION, seed=2)
        assert len(made.network.proxy.weight) == 2
        labels = tasks.outputs[[place for task in tasks.tasks for place in task.train]]
        assert made.model.head.counts.tolist() == [int((labels == output).sum()) for output in range(5)]
        assert len(done.accuracy_matrix[-1]) == 2


@pytest.mark.parametrize("recipe", ["corrected", "released"])
def test_old_means_are_those_of_outputs_that_the_task_does_not_bring(recipe):
    made = method(recipe=recipe)
    for task in (task_of(0), task_of(1)):
        made.begin_task(task)
        made.end_task(task)
    again = TaskData(2, task_of(0).classes, task_of(1).seen, task_of(0).batches)
    made.begin_task(again)
    assert set(made.old) == set(task_of(1).classes)
    assert torch.equal(made.means, made.model.head.means[list(made.old)].float())
    (batch, *_) = again.batches()
    made.loss(batch).backward()
    restored = method(recipe=recipe)
    restored.load_state_dict(made.state_dict())
    assert restored.old == made.old
    assert torch.equal(restored.basis, made.basis)


def test_samples_of_other_classes_are_an_error():
    made, task = method(), task_of(1)
    made.begin_task(task)
    (batch, *_) = task_of(0).batches()
    with pytest.raises(ValueError, match="own classes"):
        made.loss(batch)


def test_batches_without_a_pair_are_counted():
    made, task = method(), task_of(0)
    made.begin_task(task)
    (batch, *_) = task.batches()
    first = [int((batch.labels == label).nonzero()[0]) for label in batch.labels.unique()]
    alone = Batch(batch.inputs[first], batch.labels[first], batch.indices[first])
    made.loss(alone).backward()
    assert made.skipped == 1
    made.loss(batch)
    assert made.skipped == 1
    assert made.state_dict()["skipped"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "paper"}, "recipe"),
        ({"ways": {"fusions": "released"}}, "ways.*fusions"),
        ({"ways": {"fusion": "paper"}}, "fusion"),
        ({"recipe": "released", "tasks": None}, "tasks"),
        ({"prompts": 0}, "prompts"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.5}, "dropout"),
        ({"scale": 0.0}, "scale"),
        ({"contrast": -1.0}, "contrast"),
        ({"orthogonality": float("nan")}, "orthogonality"),
        ({"drift": -1.0}, "drift"),
        ({"proxy_scale": 0.0}, "proxy_scale"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"section_weights": (1.0, 1.0, 1.0)}, "section"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_a_task_without_batches_is_an_error():
    made = method()
    made.begin_task(task_of(0))
    made.end_task(task_of(0))
    with pytest.raises(ValueError, match="a task without batches"):
        made.begin_task(replace(task_of(1), batches=lambda: iter(())))


def test_images_of_another_size_are_refused():
    made = method()
    made.begin_task(task_of(0))
    with pytest.raises(ValueError, match="4 tokens a sample; expected 8"):
        made.predict(torch.zeros(2, 32))


def test_nothing_is_answered_before_a_task():
    with pytest.raises(ValueError, match="begin_task first"):
        method().predict(torch.zeros(2, 64))
