"""The spectral regulariser of a network: that of a linear head where only this trains, and it protects what it says."""

import copy
from functools import cache, partial
from statistics import median

import pytest
import torch
from small import stream
from torch import nn
from torch.nn.functional import cross_entropy

import forgetcast as fc
from forgetcast.heads.cosine import Cosine
from forgetcast.heads.linear import Linear
from forgetcast.learn.loop import Checkpointing, learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Batch, Model, TaskData
from forgetcast.methods.registry import create
from forgetcast.protect import spectral_network
from forgetcast.protect.distill import Distillation
from forgetcast.protect.spectral_head import SpectralHead, stacked
from forgetcast.protect.spectral_network import SpectralDirections, SpectralProbes
from forgetcast.protect.vulnerable import tangent_of
from protect.models import assert_plain, jacobian, moved, small_model, small_task

FORMS = [SpectralProbes, SpectralDirections]
ALL = 10_000


def frozen_body(seed, outputs=3):
    """Random features that never change, 5 of them, under a random head."""
    model = small_model(seed, outputs=outputs)
    model.backbone.requires_grad_(False)
    return model


def gradients(term, model):
    return torch.autograd.grad(term, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("seed", "sample_modes"), [(0, 1), (1, 3), (2, 5)])
def test_on_frozen_features_it_is_the_regulariser_of_the_head(form, seed, sample_modes):
    """Against `SpectralProbe` and `SpectralAnchor`: k_G sample modes there are C k_G modes here."""
    model = frozen_body(seed)
    whole, task = small_task(seed)
    phi = model.features(whole.inputs).detach()
    head = fc.LinearHead(model.head.weight.detach().T, model.head.bias.detach())
    protection = form(7.0, 3 * sample_modes, probes=ALL)
    protection.end_task(model, task)
    moved(model.head, seed)
    found = protection.loss(model, whole, model(whole.inputs))
    probe = fc.SpectralProbe.of(fc.Features(phi), head, sample_modes).loss(model(whole.inputs), 7.0)
    anchor = fc.SpectralAnchor.of(fc.Features(phi), head, sample_modes).penalty(7.0)
    assert found.item() == pytest.approx(probe.item(), rel=1e-8)
    assert found.item() == pytest.approx(anchor.value(stacked(model.head).detach()), rel=1e-8)
    for ours, theirs in zip(gradients(found, model), gradients(probe, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_later_outputs_are_held_as_those_of_the_head(form):
    """Against `SpectralHead`, whose strength is a mean over samples: 2 n mu / k."""
    model, sample_modes, strength = frozen_body(4), 2, 3.0
    whole, task = small_task(4)
    linear = SpectralHead(strength, sample_modes)
    network = form(strength * 3 * sample_modes / (2 * len(whole.labels)), 3 * sample_modes, probes=ALL)
    _, grown = small_task(5, classes=(3, 4), seen=(0, 1, 2, 3, 4), index=1)
    for protection in (linear, network):
        protection.end_task(model, task)
    model.head.grow(5)
    model.double()
    for protection in (linear, network):
        protection.begin_task(model, grown)
    moved(model.head)
    expected = linear.loss(model, whole, model(whole.inputs))
    found = network.loss(model, whole, model(whole.inputs))
    # compression may have moved part of the squared norm into a constant that no gradient sees
    assert found.item() == pytest.approx(expected.item() + linear.penalty.constant, rel=1e-8)
    for ours, theirs in zip(gradients(found, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_all_modes_are_distillation_of_all_outputs_on_the_probes(seed):
    model = small_model(seed)
    whole, task = small_task(seed)
    spectral, distillation = SpectralProbes(2.0, ALL, probes=ALL), Distillation(2.0, form="logits")
    for protection in (spectral, distillation):
        protection.end_task(model, task)
        protection.begin_task(model, task)
    assert spectral.loss(model, whole, model(whole.inputs)).item() == 0
    moved(model)
    found = spectral.loss(model, whole, model(whole.inputs))
    expected = distillation.loss(model, whole, model(whole.inputs))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, theirs)


def sequence(model, protection, tasks=3):
    """Tasks that each bring an output, the network displaced in each; the anchors, with J of what each had seen."""
    left = []
    for index in range(tasks):
        model.head.grow(2 + index)
        model.double()
        moved(model, seed=index)
        seen = tuple(range(2 + index))
        whole, task = small_task(index, classes=(0, 1 + index), seen=seen, index=index)
        protection.end_task(model, task)
        anchor = {name: value.detach().clone() for name, value in model.named_parameters()}
        left.append((jacobian(model, whole.inputs).flatten(0, 1), anchor))
    model.head.grow(3 + tasks)
    model.double()
    moved(model, seed=tasks)
    return left, whole


@pytest.mark.parametrize("modes", [1, 6, ALL])
def test_every_task_is_held_at_an_anchor_of_its_own(modes):
    """Three tasks, the head growing, against `mu / k ||S (theta - theta_tau)||^2` written out."""
    model, protection = small_model(outputs=1), SpectralDirections(5.0, modes, probes=ALL, later="free")
    left, whole = sequence(model, protection)
    now = dict(model.named_parameters())
    expected = torch.zeros((), dtype=torch.float64)
    for J, anchor in left:
        step = torch.cat([(now[n][tuple(map(slice, a.shape))] - a).flatten() for n, a in anchor.items()])
        left_vectors, values, right = torch.linalg.svd(J, full_matrices=False)
        k = min(modes, len(J))
        S = (values[:, None] * right)[:k]
        expected = expected + 5.0 / k * (S @ step).square().sum()
    found = protection.loss(model, whole, model(whole.inputs))
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(gradients(found, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def flat_root(protection):
    return torch.cat([rows.flatten(1) for rows in protection.root.values()], 1)


@pytest.mark.parametrize("rank", [3, 10, 18])
def test_a_bounded_rank_lacks_the_weakest_directions_and_no_more(rank):
    model = small_model(outputs=1)
    whole_rank = SpectralDirections(1.0, 6, probes=ALL, later="free")
    sequence(model, whole_rank, tasks=2)
    bounded = copy.deepcopy(whole_rank)
    bounded.rank = rank
    batch, task = small_task(2, classes=(0, 3), seen=(0, 1, 2, 3), index=2)
    for protection in (whole_rank, bounded):
        protection.end_task(model, task)
    assert len(bounded.gap) == min(rank, 18)
    moved(model, seed=9)
    terms = [protection.loss(model, batch, model(batch.inputs)) for protection in (whole_rank, bounded)]
    apart = torch.cat([(a - b).flatten() for a, b in zip(*[gradients(t, model) for t in terms], strict=True)])
    if rank == 18:
        assert terms[0].item() == pytest.approx(terms[1].item(), rel=1e-10)
        assert apart.norm() < 1e-9
        return
    root, gap = flat_root(whole_rank), whole_rank.gap
    left, values, _ = torch.linalg.svd(root, full_matrices=False)
    root, gap = left[:, rank:].T @ root, left[:, rank:].T @ gap
    step = torch.cat([(p - a).flatten() for p, a in zip(model.parameters(), whole_rank.anchor.values(), strict=True)])
    torch.testing.assert_close(apart, 2 * root.T @ (root @ step + gap))
    assert 0 < apart.norm() <= 2 * values[rank] * (values[rank] * step.norm() + gap.norm())
    assert 0 < terms[1].item() < terms[0].item()


@pytest.mark.parametrize("later", ["held", "free"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_forms_are_one_to_first_order(seed, later):
    """The relative difference goes to zero with the displacement; the penalty itself is of second order."""
    model = small_model(seed)
    whole, task = small_task(seed)
    protections = [form(1.0, 5, probes=ALL, later=later) for form in FORMS]
    for protection in protections:
        protection.end_task(model, task)
    model.head.grow(5)
    model.double()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    steps = moved(model, seed)
    errors = []
    for size in (1e-3, 1e-4):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(start[name] + size * steps[name])
        probes, directions = (p.loss(model, whole, model(whole.inputs)).item() for p in protections)
        errors.append(abs(probes / directions - 1))
    assert errors[0] < 0.05
    assert errors[1] < 0.2 * errors[0]


def blobs(seed, centres):
    means = 2 * torch.randn(3, 10, generator=torch.Generator().manual_seed(centres), dtype=torch.float64)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(means[labels] + noise, labels, torch.arange(60))


def trained(model, batch, steps, rate, protection=None):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(batch.inputs)
        loss = cross_entropy(logits, batch.labels)
        if protection is not None:
            loss = loss + protection.loss(model, batch, logits)
        loss.backward()
        optimizer.step()
    return model


@cache
def unprotected(seed):
    """A network that has learnt old data, new data, and the network after these without protection."""
    old, new = blobs(100 + seed, 1000 + seed), blobs(300 + seed, 2000 + seed)
    model = trained(small_model(seed, inputs=10, hidden=20), old, 60, 1e-2)
    return model, old, new, trained(copy.deepcopy(model), new, 60, 1e-3)


def energies(model, other, inputs, top):
    """Drift along the leading modes of a dense tangent kernel, and beside them."""
    drift = (other(inputs) - model(inputs)).detach().flatten()
    inside = (top.T @ drift).square().sum().item()
    return inside, drift.square().sum().item() - inside


@pytest.mark.parametrize("form", FORMS)
def test_vulnerable_drift_falls_and_the_rest_stays(form):
    """FT6, on the probes and on old samples that were none: the median of five networks and data sets."""
    falls, rests = {"probes": [], "fresh": []}, {"probes": [], "fresh": []}
    for seed in range(5):
        model, old, new, plain = unprotected(seed)
        protection = form(1.0, 10, probes=ALL)
        protection.end_task(model, TaskData(0, (0, 1, 2), (0, 1, 2), lambda old=old: iter([old])))
        held = trained(copy.deepcopy(model), new, 60, 1e-3, protection)
        for name, inputs in (("probes", old.inputs), ("fresh", blobs(200 + seed, 1000 + seed).inputs)):
            top = torch.linalg.svd(jacobian(model, inputs).flatten(0, 1), full_matrices=False).U[:, :10]
            before, after = (energies(model, other, inputs, top) for other in (plain, held))
            falls[name].append(before[0] / after[0])
            rests[name].append(after[1] / before[1])
    assert min(median(values) for values in falls.values()) >= 10
    assert all(0.5 <= median(values) <= 2 for values in rests.values())


def test_free_later_outputs_move_and_old_ones_are_held_alike():
    model = small_model()
    whole, task = small_task()
    free, held = (SpectralProbes(1.0, 6, probes=ALL, later=later) for later in ("free", "held"))
    for protection in (free, held):
        protection.end_task(model, task)
    model.head.grow(4)
    model.double()
    with torch.no_grad():
        model.head.weight[3] += 1.0
    assert free.loss(model, whole, model(whole.inputs)).item() < 1e-20
    assert held.loss(model, whole, model(whole.inputs)).item() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_without_a_matrix_the_penalty_is_the_same(form, monkeypatch):
    """Matrix-free modes, to the tolerance of the eigensolver."""
    found = []
    for memory in (2**28, 0):
        monkeypatch.setattr(spectral_network, "tangent_of", partial(tangent_of, memory=memory))
        model = small_model()
        whole, task = small_task()
        protection = form(1.0, 4, probes=ALL)
        protection.end_task(model, task)
        moved(model)
        found.append(protection.loss(model, whole, model(whole.inputs)).item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] != found[1]


@pytest.mark.parametrize("form", FORMS)
def test_noise_layers_and_mixed_precision_do_not_reach_the_penalty(form):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))
    model = Model(body, Linear(8, 3))
    nn.init.normal_(model.head.weight)
    whole, task = small_task(n=30)
    inputs = whole.inputs.float()
    task = TaskData(0, task.classes, task.seen, lambda: iter([Batch(inputs, whole.labels, whole.indices)]))
    model.train()
    model(inputs)
    before = {name: value.clone() for name, value in model.named_buffers()}
    protection = form(1.0, 5)
    protection.end_task(model, task)
    with torch.autocast("cpu", torch.bfloat16):
        term = protection.loss(model, whole, model.head(torch.zeros(1, 8)))
    assert term.item() < 1e-10
    assert model.training
    assert body[3].training
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("later", ["held", "free"])
def test_a_state_holds_all(form, later):
    model, protection = small_model(outputs=1), form(1.0, 4, probes=6, later=later)
    _, whole = sequence(model, protection)
    state = protection.state_dict()
    assert_plain(state)
    resumed = form(1.0, 4, probes=6, later=later)
    resumed.load_state_dict(copy.deepcopy(state))
    terms = [p.loss(model, whole, model(whole.inputs)) for p in (protection, resumed)]
    assert torch.equal(*terms)
    assert terms[0].item() > 0


def test_what_trains_may_change_between_tasks():
    """A parameter that froze is held as far as it goes; one that thawed is held from its own task on."""
    model, protection = small_model(), SpectralDirections(1.0, 5, probes=ALL, later="free")
    whole, task = small_task()
    first = dict(model.backbone.named_parameters())
    model.backbone.requires_grad_(False)
    protection.end_task(model, task)
    assert set(protection.root) == {"head.weight", "head.bias"}
    model.backbone.requires_grad_(True)
    protection.end_task(model, task)
    assert set(protection.root) == {"head.weight", "head.bias", *(f"backbone.{name}" for name in first)}
    assert all(not protection.root[f"backbone.{name}"][:5].any() for name in first)
    model.head = Linear(5, 3, bias=False).double()
    with pytest.raises(ValueError, match=r"without the parameters \['head.bias'\] that earlier tasks hold"):
        protection.loss(model, whole, model(whole.inputs))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: SpectralProbes(-1.0), "strength=-1.0; expected"),
        (lambda: SpectralProbes(modes=0), "modes=0; expected"),
        (lambda: SpectralDirections(probes=0), "probes=0; expected"),
        (lambda: SpectralDirections(rank=0), "rank=0; expected"),
        (lambda: SpectralProbes(later="hold"), "Did you mean 'held'"),
        (lambda: create("spectral_network", nn.Identity(), 4, form="data"), "Did you mean 'data_free'"),
        (lambda: create("spectral_network", nn.Identity(), 4, rank=4), "got rank=4 with form='probes'"),
        (
            lambda: SpectralProbes().end_task(Model(nn.Identity(), Cosine(4, 3)).double(), small_task()[1]),
            "later outputs to be held of a Cosine head",
        ),
    ],
)
def test_errors_say_what_was_expected(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_a_cosine_head_can_be_held_with_later_outputs_free():
    torch.manual_seed(0)
    model = Model(nn.Linear(4, 5), Cosine(5, 3)).double()
    whole, task = small_task()
    protection = SpectralProbes(1.0, 5, later="free")
    protection.end_task(model, task)
    moved(model)
    assert protection.loss(model, whole, model(whole.inputs)).item() > 0


@pytest.mark.parametrize("rank", [None, 12])
def test_a_killed_run_of_the_data_free_form_is_the_whole_run(rank, tmp_path):
    """The generic tests of methods have the form with probes."""

    def new():
        torch.manual_seed(5)
        options = {"strength": 0.1, "modes": 8, "probes": 20, "form": "data_free", "rank": rank}
        return create("spectral_network", nn.Sequential(nn.Linear(64, 10), nn.ReLU()), 10, **options)

    def stop(event):
        if event["task"] == 1 and event.get("epoch") == 1:
            raise KeyboardInterrupt

    optimization = Optimization(learning_rate=1e-2, epochs=3, batch_size=32)
    checkpointing = Checkpointing(tmp_path, steps=5)
    whole = new()
    matrix = learn(whole, stream(), optimization, seed=3).accuracy_matrix
    with pytest.raises(KeyboardInterrupt):
        learn(new(), stream(), optimization, seed=3, checkpointing=checkpointing, on_event=stop)
    resumed = new()
    assert learn(resumed, stream(), optimization, seed=3, checkpointing=checkpointing).accuracy_matrix == matrix
    assert len(whole.protections[0].gap) == (rank or 24)
    assert_equal(resumed.state_dict(), whole.state_dict())


def assert_equal(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    else:
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
