"""Products with the tangent of a model, against the Jacobian taken row by row in float64."""

import weakref

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from zoo import ZOO

from builders import DOUBLE, dense_jacobian
from forgetcast.tangent.gauss_newton import gauss_newton, softmax_hessian, squared_hessian
from forgetcast.tangent.jacobian import trainable
from forgetcast.tangent.linearise import Linearisation, Saved, double_backward
from forgetcast.tangent.operator import TangentOperator
from forgetcast.tangent.products import Tangent, TangentMatrix


def draws(J, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    n, c, P = J.shape
    sizes = (count, P), (count, n, c)
    return [torch.randn(size, generator=generator, dtype=DOUBLE) for size in sizes]


def assert_products(operator, J, within=1e-11):
    v, u = draws(J)
    torch.testing.assert_close(operator.forward(v), torch.einsum("ncp,kp->knc", J, v), rtol=within, atol=within)
    torch.testing.assert_close(operator.transpose(u), torch.einsum("ncp,knc->kp", J, u), rtol=within, atol=within)
    assert operator.adjoint_gap() < within


def perceptron(width=6, outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def inputs_of(count=7, seed=3):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Attention(nn.Module):
    """Fused attention: no forward mode and no double backward on the CPU."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        return self.head(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_products_are_those_of_the_jacobian(name):
    torch.manual_seed(0)
    animal = ZOO[name]()
    model = animal.model.double()
    parameters = trainable(model, animal.parameters)
    J, value = dense_jacobian(model, animal.inputs, parameters, animal.outputs)
    operator = TangentOperator(model, animal.inputs, parameters, animal.outputs, chunk=2)
    assert (operator.samples, operator.outputs, operator.parameters) == J.shape
    assert_products(operator, J)
    torch.testing.assert_close(operator.value(), value)


@pytest.mark.parametrize("strategy", ["double_backward", "forward", "difference"])
@pytest.mark.parametrize("memory", [0.0, 2.0**30])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_strategies_chunks_and_memory_change_no_number(strategy, memory, chunk):
    torch.manual_seed(0)
    model = Attention().double()
    x = torch.randn(4, 6, 8, dtype=DOUBLE)
    parameters = trainable(model)
    J, _ = dense_jacobian(model, x, parameters)
    operator = TangentOperator(model, x, parameters, strategy=strategy, chunk=chunk, memory=memory)
    assert operator.strategy == strategy
    assert_products(operator, J, within=1e-8 if strategy == "difference" else 1e-11)
    v, u = draws(J)
    expected = torch.einsum("ncp,mdp,kmd->knc", J, J, u)
    torch.testing.assert_close(operator.kernel(u), expected, rtol=1e-7, atol=1e-7)
    assert (operator.kept > 0) == (memory > 0)


def test_fused_attention_is_why_strategies_exist():
    model, x = Attention().double(), torch.randn(2, 6, 8, dtype=DOUBLE)
    point = list(trainable(model).values())

    def function(values):
        return torch.func.functional_call(model, dict(zip(trainable(model), values, strict=True)), (x,))

    along = [torch.randn_like(values) for values in point]
    with pytest.raises(RuntimeError, match="derivative"):
        double_backward(Linearisation(function, point, plain=False), along)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(function, (point,), (along,))


class Squashed(torch.autograd.Function):
    """tanh with one derivative, and forward mode only in the subclass."""

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)


class SquashedForward(Squashed):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, direction):
        return direction * (1 - ctx.saved_tensors[0] ** 2)


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.body, self.head = function, nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.function.apply(self.body(x)))


@pytest.mark.parametrize(("function", "strategy"), [(SquashedForward, "forward"), (Squashed, "difference")])
def test_auto_takes_the_first_strategy_that_works_and_says_why(function, strategy):
    torch.manual_seed(0)
    model = Custom(function).double()
    parameters = trainable(model)
    operator = TangentOperator(model, inputs_of(), parameters)
    assert operator.strategy == strategy
    assert "adjoint test" in operator.refused["double_backward"]  # autograd itself returns zeros without a word
    J, _ = dense_jacobian(model, inputs_of(), parameters)
    assert_products(operator, J, within=1e-8)


class WrongTwice(torch.autograd.Function):
    """A derivative that is right, and a second derivative of something else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return Detour.apply(g)


class Detour(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g):
        return g * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3


def test_the_adjoint_test_refuses_a_wrong_derivative():
    torch.manual_seed(0)
    model = Custom(WrongTwice).double()
    operator = TangentOperator(model, inputs_of(), {"body.weight": model.body.weight})
    assert "adjoint" in operator.refused["double_backward"]
    assert operator.strategy == "difference"
    with pytest.raises(ValueError, match=r"adjoint test.*expected a model.*Give the model"):
        TangentOperator(model, inputs_of(), {"body.weight": model.body.weight}, strategy="double_backward")


def test_a_cut_gradient_is_refused():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        @torch.no_grad()
        def forward(self, x):
            return self.layer(x)

    model = Cut().double()
    with pytest.raises(ValueError, match="no_grad"):
        TangentOperator(model, inputs_of(), trainable(model))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"parameters": {}}, "no parameters"),
        ({"parameters": {"absent": torch.zeros(2)}}, "absent"),
        ({"inputs": (inputs_of(3), inputs_of(4))}, "first axis"),
        ({"outputs": lambda y: y.sum(1)}, r"real numbers \(samples, c\)"),
        ({"strategy": "backward"}, "double_backward"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_bad_input_is_refused(change, match):
    model = perceptron()
    given = {"inputs": inputs_of(), "parameters": trainable(model)} | change
    with pytest.raises(ValueError, match=match):
        TangentOperator(model, **given)


def test_samples_that_do_not_depend_on_the_parameters_have_zero_rows():
    torch.manual_seed(0)
    animal = ZOO["experts_that_see_some_samples"]()
    model = animal.model.double()
    parameters = trainable(model, ["experts.0.weight"])  # which only the last sample meets
    J, _ = dense_jacobian(model, animal.inputs, parameters)
    assert not J[:2].any()
    for strategy in ("double_backward", "forward", "difference"):
        operator = TangentOperator(model, animal.inputs, parameters, strategy=strategy, chunk=1)
        assert_products(operator, J, within=1e-9)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).double().train()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for strategy in ("double_backward", "forward", "difference"):
        operator = TangentOperator(model, inputs_of(), trainable(model), strategy=strategy)
        operator.kernel(torch.ones(7, 3, dtype=DOUBLE))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[3].bias.requires_grad
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_later_training_does_not_move_the_operator():
    model = perceptron()
    J, _ = dense_jacobian(model, inputs_of(), trainable(model))
    kept = TangentOperator(model, inputs_of(), trainable(model))
    anew = TangentOperator(model, inputs_of(), trainable(model), memory=0)
    kept.forward(torch.zeros(kept.parameters, dtype=DOUBLE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_products(kept, J)
    assert_products(anew, J)


def test_graphs_are_freed(monkeypatch):
    saved = []
    count = Saved.count

    def counted(self, tensor):
        kept = count(self, tensor)
        saved.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(Saved, "count", counted)
    model, x = perceptron(), inputs_of()
    operator = TangentOperator(model, x, trainable(model), chunk=2)
    operator.kernel(torch.ones(7, 3, dtype=DOUBLE))
    assert operator.kept > 0
    assert any(tensor() is not None for tensor in saved)
    operator.free()
    assert operator.kept == 0
    assert all(tensor() is None for tensor in saved)  # at once, not when the garbage collector comes by
    operator.kernel(torch.ones(7, 3, dtype=DOUBLE))
    del operator
    assert all(tensor() is None for tensor in saved)


def test_kept_memory_stays_below_what_is_allowed():
    model = perceptron(width=200)
    operator = TangentOperator(model, inputs_of(40), trainable(model), chunk=4)
    u = torch.ones(40, 3, dtype=DOUBLE)
    operator.kernel(u)
    whole = operator.kept
    partly = TangentOperator(model, inputs_of(40), trainable(model), chunk=4, memory=whole / 2)
    torch.testing.assert_close(partly.kernel(u), operator.kernel(u))
    assert whole / 4 < partly.kept <= whole / 2


def test_a_linearisation_serves_every_product():
    model = perceptron()
    operator = TangentOperator(model, inputs_of(), trainable(model), chunk=3)
    start = operator.passes["model"]
    for _ in range(5):
        operator.kernel(torch.ones(7, 3, dtype=DOUBLE))
    passes = operator.passes
    assert passes["model"] - start == 1
    assert passes["transpose"] - 5 < 1
    block = TangentOperator(model, inputs_of(), trainable(model), chunk=3, memory=0)
    start = block.passes["model"]
    block.forward(torch.zeros(4, block.parameters, dtype=DOUBLE))
    assert block.passes["model"] - start == 1


def test_results_come_in_the_type_they_were_asked_in():
    model = perceptron().float()
    J, _ = dense_jacobian(model.double(), inputs_of(), trainable(model))
    operator = TangentOperator(model.float(), inputs_of().float(), trainable(model))
    v, u = draws(J)
    for dtype in (torch.float32, DOUBLE):
        product = operator.forward(v[0].to(dtype))
        assert product.dtype == operator.transpose(u[0].to(dtype)).dtype == dtype
        torch.testing.assert_close(product.double(), J @ v[0], rtol=1e-5, atol=1e-5)


def test_a_matrix_is_the_same_tangent():
    model = perceptron()
    J, value = dense_jacobian(model, inputs_of(), trainable(model))
    operator, matrix = TangentOperator(model, inputs_of(), trainable(model)), TangentMatrix(J, value)
    assert isinstance(operator, Tangent)
    assert isinstance(matrix, Tangent)
    v, u = draws(J)
    for product, of in (("forward", v), ("transpose", u), ("kernel", u)):
        torch.testing.assert_close(getattr(matrix, product)(of), getattr(operator, product)(of))
        torch.testing.assert_close(getattr(matrix, product)(of[1]), getattr(operator, product)(of)[1])
    torch.testing.assert_close(matrix.between(v, softmax_hessian), operator.between(v, softmax_hessian))
    chosen = torch.tensor([4, 1])
    torch.testing.assert_close(matrix.at(chosen).forward(v), operator.forward(v)[:, chosen])
    with pytest.raises(ValueError, match="one row for each sample"):
        TangentMatrix(J[:5], value)


@pytest.mark.parametrize("hessian", [softmax_hessian, squared_hessian])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_gauss_newton_is_the_dense_product(hessian, preconditioned):
    model = perceptron()
    J, value = dense_jacobian(model, inputs_of(), trainable(model))
    loss = torch.nn.functional.cross_entropy if hessian is softmax_hessian else torch.nn.functional.mse_loss
    target = torch.softmax(torch.randn_like(value), 1)
    H = torch.func.hessian(lambda f: loss(f, target, reduction="sum"))(value)
    G = torch.einsum("ncp,ncmd,mdq->pq", J, H, J) / 7
    root = torch.rand(G.shape[0], dtype=DOUBLE) + 0.5 if preconditioned else None
    if root is not None:
        G = root[:, None] * G * root
    operator = TangentOperator(model, inputs_of(), trainable(model), chunk=3)
    product = gauss_newton(operator, hessian, scale=1 / 7, inverse_root=root)
    v, _ = draws(J)
    torch.testing.assert_close(product(v), v @ G, rtol=1e-10, atol=1e-10)


def test_kernel_is_symmetric_positive_permuted_with_samples_and_additive_over_layers():
    model = perceptron()
    x, parameters = inputs_of(), trainable(model)
    basis = torch.eye(21, dtype=DOUBLE).view(21, 7, 3)
    K = TangentOperator(model, x, parameters).kernel(basis).view(21, 21)
    torch.testing.assert_close(K, K.T)
    assert float(torch.linalg.eigvalsh(K)[0]) > -1e-12 * float(K.trace())
    order = torch.randperm(7)
    moved = TangentOperator(model, x[order], parameters).kernel(basis).view(7, 3, 7, 3)
    torch.testing.assert_close(moved, K.view(7, 3, 7, 3)[order][:, :, order])
    halves = [TangentOperator(model, x, trainable(model, [n])).kernel(basis) for n in parameters]
    torch.testing.assert_close(sum(halves).view(21, 21), K)
