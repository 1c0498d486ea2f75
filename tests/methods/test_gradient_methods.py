"""Every gradient method on two tasks of sklearn's digits: trains, keeps what it promises, and resumes bit for bit."""

import io

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from tuned import tuned_where_needed

from forgetcast.forecast.training import SGD
from forgetcast.methods.base import Batch, Method, TaskData
from forgetcast.methods.registry import METHODS, create, method_class, needs_blocks
from forgetcast.methods.sequential import Sequential

NAMES = [name for name in METHODS if issubclass(method_class(name), Sequential)]
REPLAYING = ["replay", "der++", "icarl"]
# the backbone here is random, not pretrained, so it must learn; and rate x strength x curvature must stay below 2
OPTIONS = {
    "slca": {"backbone_rate": 0.05, "head_rate": 0.1, "epochs": 20},
    "ewc": {"strength": 10.0},
    "kronecker_ewc": {"strength": 1.0},
    "spectral_network": {"strength": 0.03, "modes": 50, "probes": 50},
    "pegp": {"threshold": 0.6},
    "vpt_nsp2": {"temperature": 1.0},
    "inflora": {"rank": 4, "threshold": 0.6},
    "o_lora": {"rank": 4},
    "sd_lora": {"ranks": (4, 2)},
    "osf": {"ranks": (0.3, 4)},
    "lae": {"decay": 0.9, "head_only": 0.1},
    "advised": {"budget": 1.0, "capacity": 40},
}
CLASSES = [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:600], dtype=torch.float32) / 16, torch.tensor(labels[:600])


def backbone(name="sequential"):
    layers = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
    return tuned_where_needed(name, layers, 16)


def made(name):
    torch.manual_seed(0)
    return create(name, backbone(name), 16, **OPTIONS.get(name, {}))


def task_of(digits, index, joint=False):
    images, labels = digits
    seen = tuple(label for classes in CLASSES[: index + 1] for label in classes)
    rows = torch.isin(labels, torch.tensor(seen if joint else CLASSES[index])).nonzero()[:, 0]
    return TaskData(
        index,
        CLASSES[index],
        seen,
        lambda: (Batch(images[r], labels[r], r) for r in torch.split(rows, 50)),
        lambda: SGD(learning_rate=0.1, steps=6 * -(-len(rows) // 32), batch_size=32, momentum=0.9),
    )


def learn(method, digits, index, epochs=6, watch=lambda: None):
    """The loop of the contract, with its batches in one fixed order a task."""
    images, labels = digits
    task = task_of(digits, index, method.joint)
    rows = torch.cat([batch.indices for batch in task.batches()])
    generator = torch.Generator().manual_seed(index)
    method.begin_task(task)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1, momentum=0.9)
    method.model.train()
    for _ in range(epochs):
        for r in rows[torch.randperm(len(rows), generator=generator)].split(32):
            optimizer.zero_grad()
            method.loss(Batch(images[r], labels[r], r)).backward()
            method.after_backward()
            watch()
            optimizer.step()
            method.after_step()
    method.end_task(task)


def accuracy(method, digits, index):
    images, labels = digits
    mine = torch.isin(labels, torch.tensor(CLASSES[index]))
    method.model.eval()
    with torch.no_grad():
        return (method.predict(images[mine]).argmax(1) == labels[mine]).double().mean().item()


@pytest.fixture(scope="module")
def old_accuracy_of_fine_tuning(digits):
    method = made("sequential")
    for index in range(2):
        learn(method, digits, index)
    return accuracy(method, digits, 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_receives_gradient_in_both_tasks(name, digits):
    method = made(name)
    frozen = {n: p.detach().clone() for n, p in method.model.named_parameters() if not p.requires_grad}
    inside = {n for n, _ in method.model.named_parameters() if "backbone" in n}
    tuner = {n for n in inside if "adapter" in n or ".prompt." in n}
    whole = name in ("probe", "spectral") or (needs_blocks(name) and not tuner)
    assert set(frozen) == (inside if whole else inside - tuner if tuner else set())
    for index in range(2):
        reached, training = set(), set()

        def watch(reached=reached, training=training):
            for n, p in method.model.named_parameters():
                if p.grad is not None and p.grad.abs().max() > 0:
                    reached.add(n)
                if p.requires_grad:
                    training.add(n)

        learn(method, digits, index, epochs=1, watch=watch)
        assert reached == training
    parameters = dict(method.model.named_parameters())
    # osf alone writes what its layers have learnt into their weights
    written = {f"backbone.{layer}.weight" for layer in method.names} if name == "osf" else set()
    assert {n for n, value in frozen.items() if not torch.equal(parameters[n], value)} == written
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in parameters.values() if p.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_resume_after_the_first_task_is_bit_identical(name, digits):
    method = made(name)
    learn(method, digits, 0, epochs=1)
    # weights_only admits tensors and plain values alone
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    torch.manual_seed(77)
    resumed = create(name, backbone(name), 16, **OPTIONS.get(name, {}))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (method, resumed):
        learn(each, digits, 1, epochs=1)
    ours, theirs = method.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    images = digits[0]
    with torch.no_grad():
        assert torch.equal(method.predict(images), resumed.predict(images))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_task_is_learnt(name, digits):
    method = made(name)
    learn(method, digits, 0)
    # five classes: chance is .2
    assert accuracy(method, digits, 0) > 0.5


@pytest.mark.parametrize("name", [*REPLAYING, "joint"])
def test_old_samples_keep_the_old_task(name, digits, old_accuracy_of_fine_tuning):
    method = made(name)
    for index in range(2):
        learn(method, digits, index)
    assert old_accuracy_of_fine_tuning < 0.3
    assert accuracy(method, digits, 0) > old_accuracy_of_fine_tuning + 0.3


@pytest.mark.parametrize("name", ["ewc", "kronecker_ewc", "si", "lwf", "spectral_network", "der"])
def test_a_protection_holds_the_old_outputs(name, digits):
    """Against the same method with its protection taken away, on the drift of the old logits."""

    def drift(protected):
        method = made(name)
        learn(method, digits, 0)
        if not protected:
            method.protections = ()
        before = method.predict(digits[0]).detach()
        learn(method, digits, 1)
        return (method.predict(digits[0]).detach()[:, :5] - before).square().mean().item()

    assert drift(True) < 0.8 * drift(False)


def test_icarl_predicts_by_the_nearest_mean(digits):
    method = made("icarl")
    learn(method, digits, 0, epochs=1)
    images = digits[0]
    with torch.no_grad():
        phi = torch.nn.functional.normalize(method.model.features(images))
        torch.testing.assert_close(method.predict(images), -(torch.cdist(phi, method.means) ** 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(method.means.norm(dim=1), torch.ones(5))


def test_icarl_marks_outputs_without_exemplars(digits):
    images, labels = digits
    rows = (labels == 4).nonzero()[:, 0]
    task = TaskData(0, (4,), (4,), lambda: iter([Batch(images[rows], labels[rows], rows)]))
    method = made("icarl")
    method.begin_task(task)
    method.end_task(task)
    assert method.predict(images).isfinite().all()
    assert (method.predict(images).argmax(1) == 4).all()


def test_slca_has_two_rates_and_realigns_the_head_alone(digits):
    method = made("slca")
    learn(method, digits, 0)
    assert [group["lr"] for group in method.parameter_groups()] == [0.05, 0.1]
    phi = method.model.features(digits[0][digits[1] == 3]).detach().double()
    statistics = method.gaussians.classes[3]
    torch.testing.assert_close(statistics["mean"], phi.mean(0))
    covariance = phi.T.cov() + 1e-4 * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(statistics["root"] @ statistics["root"].T, covariance)
    task = task_of(digits, 1)
    method.begin_task(task)
    before = {n: p.detach().clone() for n, p in method.model.named_parameters()}
    method.end_task(task)
    changed = {n for n, p in method.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"head.weight", "head.bias"}
    # the new rows were zero: alignment alone has taught all ten classes
    assert min(accuracy(method, digits, 0), accuracy(method, digits, 1)) > 0.5


def test_task_loss_leaves_old_outputs_alone(digits):
    images, labels = digits
    rows = (labels >= 5).nonzero()[:20, 0]
    for outputs, untouched in (("task", True), ("seen", False)):
        method = create("sequential", backbone(), 16, loss_outputs=outputs)
        method.begin_task(task_of(digits, 1))
        method.loss(Batch(images[rows], labels[rows], rows)).backward()
        assert (method.model.head.bias.grad[:5] == 0).all() == untouched


@pytest.mark.parametrize("name", NAMES)
def test_registered_names_are_methods(name):
    assert isinstance(made(name), Method)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: method_class("icral"), "method='icral'; expected one of .* Did you mean 'icarl'"),
        (lambda: create("sequential", backbone(), 16, loss_outputs="all"), "loss_outputs='all'; expected"),
        (lambda: create("replay", backbone(), 16, select="herd"), "Did you mean 'herding'"),
        (lambda: create("icarl", backbone(), 16, count=0), "count=0; expected"),
        (lambda: create("slca", backbone(), 16, temperature=0.0), "temperature=0.0; expected"),
    ],
)
def test_errors_say_what_was_expected(use, message):
    with pytest.raises(ValueError, match=message):
        use()
