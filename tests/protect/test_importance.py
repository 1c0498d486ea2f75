"""EWC against dense Fisher matrices, SI against the loss itself."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from forgetcast.protect.fisher import output_scores
from forgetcast.protect.importance import FisherPenalty, PathPenalty
from protect.models import assert_plain, jacobian, moved, small_model, small_task


def flat(values):
    return torch.cat([value.flatten() for value in values.values()])


def dense_fisher(model, x, outputs, likelihood="categorical"):
    J = jacobian(model, x)[:, outputs]
    p = model(x).detach()[:, outputs].softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    H = H if likelihood == "categorical" else torch.eye(len(outputs), dtype=p.dtype).expand_as(H)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(x)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize(("hidden", "outputs"), [(0, [0, 1, 2]), (5, [0, 1, 2]), (5, [0, 2])])
def test_exact_fisher_is_the_dense_diagonal(likelihood, hidden, outputs):
    model = small_model(hidden=hidden)
    whole, task = small_task(classes=tuple(outputs))
    penalty = FisherPenalty(3.0, likelihood=likelihood)
    assert penalty.loss(model, whole, model(whole.inputs)) is None
    penalty.end_task(model, task)
    diagonal = dense_fisher(model, whole.inputs, outputs, likelihood).diagonal()
    torch.testing.assert_close(flat(penalty.importance), diagonal)
    step = flat(moved(model))
    value = penalty.loss(model, whole, model(whole.inputs))
    torch.testing.assert_close(value, 1.5 * (diagonal * step**2).sum())


def test_empirical_fisher_is_the_squared_gradient_of_each_sample():
    model = small_model()
    whole, task = small_task()
    penalty = FisherPenalty(1.0, fisher="empirical")
    penalty.end_task(model, task)
    squares = []
    for x, y in zip(whole.inputs, whole.labels, strict=True):
        loss = cross_entropy(model(x[None]), y[None])
        squares.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) ** 2)
    torch.testing.assert_close(flat(penalty.importance), torch.stack(squares).mean(0))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_sampled_scores_have_the_exact_ones_as_mean(likelihood):
    draws = 40_000
    logits = torch.tensor([[0.7, 0.2, 0.1, 9.0]]).log()
    labels = torch.zeros(1, dtype=torch.int64)
    options = {"outputs": [0, 1, 2], "likelihood": likelihood}
    exact = output_scores(logits, labels, fisher="exact", **options)
    many = output_scores(
        logits.repeat(draws, 1),
        labels.repeat(draws),
        fisher="sampled",
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    # entries of r r^T have a variance of at most 2; five standard errors
    found = torch.einsum("knc,knd->cd", many, many) / draws
    torch.testing.assert_close(found, torch.einsum("knc,knd->cd", exact, exact), atol=5 * (2 / draws) ** 0.5, rtol=0)


def test_offline_penalties_of_two_tasks_add_up_to_a_constant():
    model = small_model()
    together, parts = FisherPenalty(2.0), [FisherPenalty(2.0), FisherPenalty(2.0)]
    for seed, part in enumerate(parts):
        whole, task = small_task(seed)
        together.end_task(model, task)
        part.end_task(model, task)
        moved(model, seed)
    logits = model(whole.inputs)

    def gap():
        return together.loss(model, whole, logits) - sum(part.loss(model, whole, logits) for part in parts)

    before = gap().item()
    moved(model, 5)
    assert gap().item() == pytest.approx(before)
    assert before < 0


def test_online_form_decays_the_fisher_and_moves_the_anchor():
    model = small_model()
    online = FisherPenalty(2.0, decay=0.25)
    fishers = []
    for seed in range(2):
        whole, task = small_task(seed)
        online.end_task(model, task)
        fishers.append(dense_fisher(model, whole.inputs, [0, 1, 2]).diagonal())
        assert online.loss(model, whole, model(whole.inputs)) == 0
        moved(model, seed)
    torch.testing.assert_close(flat(online.importance), 0.25 * fishers[0] + fishers[1])


@pytest.mark.parametrize("make", [lambda: FisherPenalty(1.0), lambda: FisherPenalty(1.0, decay=0.5)])
def test_a_grown_head_is_held_in_its_old_rows(make):
    model = small_model(outputs=2)
    whole, task = small_task(classes=(0, 1))
    penalty = make()
    penalty.end_task(model, task)
    model.head.grow(4)
    with torch.no_grad():
        model.head.weight[2:] += 5
    value = penalty.loss(model, whole, model(whole.inputs))
    assert value == 0
    with torch.no_grad():
        model.head.weight[:2] += 1
    value = penalty.loss(model, whole, model(whole.inputs))
    value.backward()
    assert value > 0
    assert (model.head.weight.grad[:2] != 0).all()
    assert (model.head.weight.grad[2:] == 0).all()
    _, second = small_task(1, classes=(2, 3), seen=(0, 1, 2, 3), index=1)
    penalty.end_task(model, second)
    assert penalty.importance["head.weight"].shape == (4, 5)
    assert (penalty.importance["head.weight"] > 0).all()


def test_samples_bounds_what_is_read():
    model = small_model()
    whole, task = small_task()
    few, all_of_seven = FisherPenalty(1.0, samples=7), FisherPenalty(1.0)
    few.end_task(model, task)
    all_of_seven.end_task(model, small_task()[1].__class__(0, (0, 1, 2), (0, 1, 2), lambda: iter([first(whole, 7)])))
    torch.testing.assert_close(few.importance, all_of_seven.importance)


def first(whole, n):
    return type(whole)(whole.inputs[:n], whole.labels[:n], whole.indices[:n])


@pytest.mark.parametrize("rate", [0.2, 0.01])
def test_path_integral_on_a_quadratic_is_the_loss_decrease(rate):
    # L = |W a + b - t|^2 / 2: a step d lowers it by -g.d - d H d / 2, so the path exceeds it by the sum of d H d / 2
    model = small_model(hidden=0)
    whole, task = small_task(n=20)
    target = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    penalty = PathPenalty(1.0)
    penalty.begin_task(model, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def loss():
        return (model(whole.inputs) - target).square().sum() / 40

    start, excess = loss().item(), 0.0
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        penalty.after_backward(model)
        before = model(whole.inputs).detach()
        optimizer.step()
        penalty.after_step(model)
        excess += (model(whole.inputs).detach() - before).square().sum().item() / 40
    path = sum(value.sum().item() for value in penalty.path.values())
    decrease = start - loss().item()
    assert decrease > 0.01
    assert path == pytest.approx(decrease + excess)
    if rate == 0.01:
        assert path == pytest.approx(decrease, rel=0.05)


def test_path_leaves_out_the_penaltys_own_gradient():
    model = small_model()
    whole, task = small_task()
    penalty = PathPenalty(0.7)
    penalty.importance = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    penalty.anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved(model)
    penalty.begin_task(model, task)
    pure = cross_entropy(model(whole.inputs), whole.labels)
    gradients = torch.autograd.grad(pure, list(model.parameters()))
    logits = model(whole.inputs)
    (cross_entropy(logits, whole.labels) + penalty.loss(model, whole, logits)).backward()
    penalty.after_backward(model)
    steps = moved(model, 4)
    penalty.after_step(model)
    for (name, path), gradient in zip(penalty.path.items(), gradients, strict=True):
        torch.testing.assert_close(path, -gradient * steps[name])


def test_path_importance_follows_its_formula_and_grows():
    model = small_model(outputs=2)
    whole, task = small_task(classes=(0, 1))
    penalty = PathPenalty(1.0, damping=0.5)
    penalty.begin_task(model, task)
    steps = moved(model)
    path = {name: torch.randn_like(step) for name, step in steps.items()}
    penalty.path = path
    penalty.end_task(model, task)
    for name, step in steps.items():
        torch.testing.assert_close(penalty.importance[name], path[name].clamp(min=0) / (step**2 + 0.5))
    old = penalty.importance["head.weight"]
    model.head.grow(3)
    _, second = small_task(classes=(2,), seen=(0, 1, 2), index=1)
    penalty.begin_task(model, second)
    penalty.end_task(model, second)
    torch.testing.assert_close(penalty.importance["head.weight"][:2], old)
    assert (penalty.importance["head.weight"][2:] == 0).all()


@pytest.mark.parametrize("make", [lambda: FisherPenalty(2.0, fisher="sampled"), lambda: PathPenalty(2.0)])
def test_state_restores_the_penalty(make):
    model = small_model()
    whole, task = small_task()
    penalty, other = make(), make()
    penalty.begin_task(model, task)
    cross_entropy(model(whole.inputs), whole.labels).backward()
    penalty.after_backward(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    penalty.after_step(model)
    penalty.end_task(model, task)
    assert_plain(penalty.state_dict())
    other.load_state_dict(penalty.state_dict())
    moved(model)
    logits = model(whole.inputs)
    assert penalty.loss(model, whole, logits) == other.loss(model, whole, logits) > 0
    for each in (penalty, other):
        each.begin_task(model, task)
        each.end_task(model, task)
    assert all(torch.equal(penalty.importance[name], other.importance[name]) for name in penalty.importance)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FisherPenalty(-1.0), "strength=-1.0; expected"),
        (lambda: FisherPenalty(1.0, fisher="exactly"), "Did you mean 'exact'"),
        (lambda: FisherPenalty(1.0, likelihood="normal"), "likelihood='normal'; expected"),
        (lambda: FisherPenalty(1.0, decay=2.0), "decay=2.0; expected"),
        (lambda: FisherPenalty(1.0, samples=0), "samples=0; expected"),
        (lambda: PathPenalty(1.0, damping=0.0), "damping=0.0; expected"),
        (lambda: FisherPenalty(1.0).end_task(small_model(), small_task(n=0)[1]), "hold no samples; expected at least"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
