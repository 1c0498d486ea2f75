r"""The derivative J of a function at a point, as two products: `J v` in three ways, `J^T u` by reverse mode.

    double_backward   the gradient of u -> <J^T u, v>; the graph is kept, so that a further J v costs one forward pass
    forward           dual numbers: nothing is kept, about 3.5 forward passes each
    difference        (f(theta + h v) - f(theta - h v)) / 2h, extrapolated: forward passes only, whatever f is made of

The first two differentiate every operation twice. Fused attention does not allow it, so under them
`scaled_dot_product_attention` runs in its plain form: the same function to rounding.

`torch.func.linearize` is not among them: tracing a small transformer took as long as 40 of its forward passes, and the
product it gave was no cheaper than that of the kept graph.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from math import inf, sqrt

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgetcast.checks import complaint

Point = Sequence[Tensor]
Function = Callable[[Point], Tensor]
ORDERS = 4  # of extrapolation


class Saved:
    """The memory that a graph holds, each storage counted once. Apart from the graph, which holds on to its hooks."""

    def __init__(self, standing: Iterable[Tensor]) -> None:
        self.memory = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in standing}

    def count(self, tensor: Tensor) -> Tensor:
        """Count a tensor as the graph saves it."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.memory += storage.nbytes()
        return tensor.detach()  # with its graph, a saved output would keep itself alive for ever


class Linearisation:
    """`f(theta + v) = value + J v` for a function of several tensors: one graph, kept for every product.

    Args:
        function: maps tensors to one tensor.
        point: theta.
        plain: whether attention runs unfused, as exact products need it.
        standing: tensors that are in memory anyway.

    Attributes:
        value: f(theta), detached.
    """

    def __init__(self, function: Function, point: Point, *, plain: bool, standing: Iterable[Tensor] = ()) -> None:
        self.function = function
        self.point = [values.detach() for values in point]
        self.plain = plain
        self._saved = Saved((*point, *standing))
        self._leaves = [values.detach().requires_grad_() for values in point]
        with self._recorded():
            self._out = function(self._leaves)
        self.value = self._out.detach()

    @property
    def memory(self) -> int:
        """Bytes that the graph holds so far, beside theta and what is standing."""
        return self._saved.memory

    @property
    def differentiable(self) -> bool:
        """Whether f depends on theta as far as autograd can see."""
        return self._out.requires_grad

    def transpose(self, u: Tensor) -> list[Tensor]:
        """`J^T u`, one tensor for each of theta. Cost: one backward pass."""
        if not self.differentiable:
            return [torch.zeros_like(values) for values in self.point]
        return list(grad(self._out, self._leaves, u.to(self._out), retain_graph=True, materialize_grads=True))

    @cached_property
    def transposed(self) -> tuple[Tensor, list[Tensor | None]]:
        """A cotangent u and `J^T u` as a differentiable function of it. Cost: one backward pass, once."""
        u = torch.zeros_like(self._out, requires_grad=True)
        if not self.differentiable:
            return u, [None for _ in self.point]
        with self._recorded():
            gradients = grad(self._out, self._leaves, u, create_graph=True, allow_unused=True)
        return u, [None if part is None or not part.requires_grad else part for part in gradients]

    def kernels(self) -> AbstractContextManager[None]:
        """In which f is evaluated."""
        return sdpa_kernel(SDPBackend.MATH) if self.plain else nullcontext()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        with torch.enable_grad(), self.kernels(), saved_tensors_hooks(self._saved.count, lambda tensor: tensor):
            yield


def double_backward(graph: Linearisation, v: Point) -> Tensor:
    """`J v` as the gradient of `u -> <J^T u, v>`, which is linear in u."""
    u, gradients = graph.transposed
    parts = [part for part in gradients if part is not None]
    along = [direction for part, direction in zip(gradients, v, strict=True) if part is not None]
    if not parts:
        return torch.zeros_like(graph.value)
    return grad(parts, u, along, retain_graph=True, materialize_grads=True)[0]


def dual_numbers(graph: Linearisation, v: Point) -> Tensor:
    """`J v` by forward mode."""
    with graph.kernels(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)  # torch's own, at its first use
        product: Tensor = torch.func.jvp(graph.function, (graph.point,), (list(v),))[1]
    return product


def central_difference(graph: Linearisation, v: Point, *, halvings: int = 20) -> Tensor:
    r"""`J v` by central differences, the step halved and extrapolated until two estimates agree.

        D_0(h) = (f(theta + h v) - f(theta - h v)) / 2h
        D_j(h) = D_{j-1}(h) + (D_{j-1}(h) - D_{j-1}(2h)) / (4^j - 1)

    Starts at `||h v|| = ||theta|| / 8`; stops at an agreement of eps^(2/3), or of eps^(1/3) when two halvings brought
    none better.

    Raises:
        ValueError: the best agreement is worse than eps^(1/3).

    Cost: two forward passes for each step, typically 4 to 6 steps. Source: Ridders, Adv. Eng. Softw. 4 (1982).
    """
    size, length = _norm(graph.point), _norm(v)
    if length == 0:
        return torch.zeros_like(graph.value)
    reach = (size if size > 0 else 1.0) / length
    eps = max(torch.finfo(values.dtype).eps for values in (*graph.point, graph.value))
    enough = eps ** (1 / 3)
    least = eps ** (2 / 3) * _norm([graph.value]) / reach + torch.finfo(torch.float64).tiny  # less is rounding
    best, agreement, behind = graph.value, inf, 0
    coarse = [_slope(graph, v, reach / 8)]
    for halving in range(1, halvings):
        fine = [_slope(graph, v, reach / 8 / 2**halving)]
        behind += 1
        for order, rough in enumerate(coarse, 1):
            fine.append(fine[-1] + (fine[-1] - rough) / (4**order - 1))
            apart = max(_norm([fine[-1] - fine[-2]]), _norm([fine[-1] - rough])) / max(_norm([fine[-1]]), least)
            if apart < agreement:
                best, agreement, behind = fine[-1], apart, 0
        if agreement <= eps ** (2 / 3) or (agreement <= enough and behind >= 2):
            break
        coarse = fine[:ORDERS]  # a kink that a longer step crossed is forgotten
    if not agreement <= enough:
        raise complaint(
            f"central differences along a direction agree only to {agreement:.1g} in {graph.value.dtype}",
            f"an agreement of at least {enough:.1g}",
            "Give the model in float64, or operations that strategy='double_backward' can differentiate.",
        )
    return best


def _slope(graph: Linearisation, v: Point, h: float) -> Tensor:
    with torch.no_grad(), graph.kernels():
        ahead = graph.function([x.add(along, alpha=h) for x, along in zip(graph.point, v, strict=True)])
        back = graph.function([x.add(along, alpha=-h) for x, along in zip(graph.point, v, strict=True)])
    return (ahead - back) / (2 * h)


PRODUCTS: dict[str, Callable[[Linearisation, Point], Tensor]] = {
    "double_backward": double_backward,
    "forward": dual_numbers,
    "difference": central_difference,
}
PLAIN = {"double_backward": True, "forward": True, "difference": False}


def _norm(parts: Iterable[Tensor]) -> float:
    return sqrt(sum(float(part.double().square().sum()) for part in parts))
