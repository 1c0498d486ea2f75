"""Blocks of the tangent kernel over tasks: of any module, before and after a training."""

import copy

import pytest
import torch
from torch import nn

import forgetcast as fc
from builders import DOUBLE, dense_jacobian, features, relative_error
from forgetcast.tangent.blocks import TaskKernels
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.kernel import joint_kernel, tangent_kernel

SIZES = (5, 3, 4)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).double()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def samples(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=draw, dtype=DOUBLE), torch.randint(0, 3, (n,), generator=draw)) for n in SIZES]


@pytest.mark.parametrize("make", [perceptron, convolutions])
def test_every_block_of_any_module(make):
    model, tasks = make(), samples()
    before = copy.deepcopy(model.state_dict())
    chosen = trainable(model)
    jacobians = [dense_jacobian(model, x, chosen)[0] for x, _ in tasks]
    model.train()
    full, trace = fc.task_kernels(model, tasks), fc.task_kernels(model, tasks, trace=True)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for s in range(3):
        for t in range(3):
            dense = torch.einsum("icp,jdp->icjd", jacobians[s], jacobians[t])
            assert relative_error(full.blocks[s][t], dense) <= 1e-10
            mean = dense.diagonal(dim1=1, dim2=3).mean(-1)
            assert relative_error(trace.blocks[s][t], mean) <= 1e-10
            assert relative_error(full.reduced().blocks[s][t], mean) <= 1e-10
            assert relative_error(full.matrix(s, t), dense.flatten(2).flatten(0, 1)) <= 1e-10
    joint = torch.cat([J.flatten(0, 1) for J in jacobians])
    assert relative_error(full.joint(), joint @ joint.T) <= 1e-10


def test_a_choice_of_parameters_and_of_outputs():
    model, tasks = perceptron(), samples()
    found = fc.task_kernels(model, tasks, parameters=["0.weight"], outputs=lambda logits: logits[:, :2])
    alone = tangent_kernel(
        model.eval(), tasks[0][0], tasks[2][0], parameters=trainable(model, ["0.weight"]), outputs=lambda y: y[:, :2]
    )
    assert relative_error(found.blocks[0][2], alone.ab) <= 1e-12
    assert found.blocks[0][2].shape == (5, 2, 4, 2)


def test_a_linear_head_by_its_features():
    tasks = samples()
    for bias in (True, False):
        module = nn.Linear(6, 3, bias=bias, dtype=DOUBLE)
        found = fc.task_kernels(module, tasks, trace=True)
        given = TaskKernels.of_features([x for x, _ in tasks], bias=bias)
        for s in range(3):
            for t in range(3):
                assert relative_error(found.blocks[s][t], given.blocks[s][t]) <= 1e-12


def test_mappings_loaders_and_texts_of_different_lengths():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

        def forward(self, input_ids):
            return self.head(torch.tanh(self.table(input_ids)).mean(1))

    torch.manual_seed(0)
    model = Words().double()
    ids = [torch.randint(0, 20, (3, length)) for length in (4, 6)]
    mapped = [{"input_ids": x, "labels": torch.zeros(3, dtype=torch.int64)} for x in ids]
    found = fc.task_kernels(model, mapped)
    left, right = (dense_jacobian(model, {"input_ids": x}, trainable(model), lambda y: y)[0] for x in ids)
    assert relative_error(found.blocks[0][1], torch.einsum("icp,jdp->icjd", left, right)) <= 1e-10
    x, y = samples()[0]
    batched = [(x[:2], y[:2]), (x[2:], y[2:])]
    whole, parts = (fc.task_kernels(perceptron(), [task]) for task in ((x, y), batched))
    assert relative_error(whole.matrix(0, 0), parts.matrix(0, 0)) <= 1e-12


def test_gaps_of_a_network_are_those_of_its_linearisation():
    """The static forecast of each step by explicit Jacobians, task after task."""
    model, tasks = perceptron().eval(), samples()
    gaps = fc.task_gaps(model, tasks, 0.8)
    pairs = [dense_jacobian(model, x, trainable(model)) for x, _ in tasks]
    J = [jacobian.flatten(0, 1) for jacobian, _ in pairs]
    delta = torch.zeros(J[0].shape[1], dtype=DOUBLE)
    ends = []
    for jacobian, (_, outputs), (_, y) in zip(J, pairs, tasks, strict=True):
        rest = (outputs - torch.nn.functional.one_hot(y, 3)).flatten() + jacobian @ delta
        normal = jacobian.T @ jacobian + 0.8 * torch.eye(len(delta), dtype=DOUBLE)
        delta = delta - torch.linalg.solve(normal, jacobian.T @ rest)
        ends.append(delta)
    for k in range(3):
        drift = J[k] @ (ends[-1] - ends[k])
        assert float((gaps.drift(k).flatten() - drift).norm()) <= 1e-9 * float((J[k] @ ends[-1]).norm())


def settled(model: nn.Module, x, y, penalty: float) -> None:
    """Train to the minimum of the squared loss with a penalty toward the start."""
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        moved = sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))
        value = (model(x) - nn.functional.one_hot(y, 3)).square().sum() / 2 + penalty / 2 * moved
        value.backward()
        return value

    optimizer.step(loss)


def test_a_wide_network_really_trained():
    """In the lazy regime: errors forecast from the tangent of the start against training to the minimum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    tasks = samples()
    before, gaps = fc.task_kernels(model, tasks), fc.task_gaps(model, tasks, 100.0)
    for x, y in tasks:
        settled(model, x, y, 100.0)
    with torch.no_grad():
        ends = [float((model(x) - nn.functional.one_hot(y, 3)).square().sum(1).mean()) for x, y in tasks]
    assert gaps.table["end"].tolist() == pytest.approx(ends, rel=0.03)
    assert before.shift(fc.task_kernels(model, tasks))["change"].max() < 0.05


def test_gaps_in_pieces_and_in_single_precision():
    model, tasks = perceptron(), samples()
    whole = fc.task_gaps(model, tasks, 0.5)
    pieces = fc.task_gaps(model, tasks, 0.5, chunk=2)
    single = fc.task_gaps(model.float(), [(x.float(), y) for x, y in tasks], 0.5)
    for name in ("own", "end", "bound", "rademacher"):
        assert whole.table[name].to_numpy() == pytest.approx(pieces.table[name].to_numpy(), rel=1e-10)
        assert whole.table[name].to_numpy() == pytest.approx(single.table[name].to_numpy(), rel=1e-4)


def test_rounding_of_single_precision_is_not_inverted():
    """Twenty samples of rank 6 without a penalty: in float32 fourteen eigenvalues are noise, and count as zero."""
    x = features(20, 6, decay=0.3, dtype=torch.float32)
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    found = [
        fc.task_gaps(nn.Linear(6, 2, bias=False).to(kind), [(x.to(kind), y.to(kind))], 0.0, trace=True).tasks[0]
        for kind in (torch.float64, torch.float32)
    ]
    assert all(int((task._inverse > 0).sum()) == 6 for task in found)


def test_how_far_the_blocks_move():
    model, tasks = perceptron(), samples()
    before = fc.task_kernels(model, tasks)
    still = before.shift(fc.task_kernels(model, tasks))
    assert (still["change"] == 0).all()
    assert still["alignment"].to_numpy() == pytest.approx(1.0)
    with torch.no_grad():
        model[3].weight.mul_(2.0)
    after = fc.task_kernels(model, tasks)
    moved = before.shift(after)
    for (s, t), row in moved.iterrows():
        was, now = before.matrix(s, t), after.matrix(s, t)
        assert row["change"] == pytest.approx(float((now - was).norm() / was.norm()))
        assert row["alignment"] == pytest.approx(float((was * now).sum() / (was.norm() * now.norm())))
        assert row["overlap_after"] == after.overlap(s, t)
        assert row["before"] == pytest.approx(before.table["size"][s, t])
    silent = TaskKernels(tuple(tuple(torch.zeros_like(block) for block in row) for row in before.blocks))
    assert silent.shift(before)["change"].eq(float("inf")).all()
    assert silent.shift(before)["alignment"].isna().all()
    with pytest.raises(ValueError, match="expected kernels of the same samples, of one kind"):
        before.shift(after.reduced())


def test_bad_models_and_tasks():
    model, tasks = perceptron(), samples()
    with pytest.raises(ValueError, match="a kernel of no sets"):
        fc.task_kernels(model, [])
    with pytest.raises(ValueError, match="probes=4 for the full kernel"):
        fc.task_kernels(model, tasks, probes=4)
    with pytest.raises(ValueError, match="task 1: no targets"):
        fc.task_gaps(model, [tasks[0], tasks[1][0]], 1.0)
    with pytest.raises(ValueError, match="label 5 for a head of 3 outputs"):
        fc.task_gaps(model, [(tasks[0][0], tasks[0][1] + 3)], 1.0)
    with pytest.raises(ValueError, match="task 0 samples .* holds nan"):
        fc.task_kernels(model, [tasks[0][0] * float("nan")])
    with pytest.raises(ValueError, match="got penalty=-0.1"):
        fc.task_gaps(model, tasks, -0.1)
    with pytest.raises(ValueError, match="expected at most memory"):
        fc.task_kernels(model, tasks, memory=10.0)
    assert len(joint_kernel(model, [x for x, _ in tasks])[1]) == 2


def test_bad_blocks():
    a, b = features(4, 3, seed=1), features(3, 3, seed=2)
    rows = ((a @ a.T, a @ b.T), (b @ a.T, b @ b.T))
    assert len(TaskKernels(rows)) == 2
    with pytest.raises(ValueError, match="T rows of T blocks"):
        TaskKernels((rows[0],))
    with pytest.raises(ValueError, match="T rows of T blocks"):
        TaskKernels(())
    with pytest.raises(ValueError, match=r"a block \[1\]\[0\] of shape \(4, 3\)"):
        TaskKernels((rows[0], (a @ b.T, b @ b.T)))
    other = torch.eye(6, dtype=DOUBLE).view(3, 2, 3, 2)
    with pytest.raises(ValueError, match=r"beside tasks of \[\(3, 2\), \(2, 3\)\]"):
        TaskKernels(((other, other.reshape(3, 2, 2, 3)), (other.reshape(2, 3, 3, 2), other.reshape(2, 3, 2, 3))))
    with pytest.raises(ValueError, match=r"blocks \[0\]\[1\] and \[1\]\[0\] that differ"):
        TaskKernels((rows[0], (2 * b @ a.T, b @ b.T)))
    with pytest.raises(ValueError, match=r"block \[0\]\[1\] .* holds nan"):
        TaskKernels(((a @ a.T, a @ b.T * float("nan")), rows[1]))
    with pytest.raises(ValueError, match="expected a positive semi-definite matrix"):
        TaskKernels(((-a @ a.T,),)).eigen(0)
    with pytest.raises(ValueError, match="of one width"):
        TaskKernels.of_features([a, a[:, :2]])
