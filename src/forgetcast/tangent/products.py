r"""What is asked of a tangent operator J: `J v` and `J^T u`. One form has a matrix behind it, the other a model.

Rows of J are samples x outputs, sample after sample; columns are the trainable parameters, flattened one after another.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from forgetcast.checks import complaint

Middle = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Tangent(Protocol):
    """J (n c x P) at some parameters; products take one vector or a block of k and return the type they are given."""

    @property
    def samples(self) -> int:
        """Number of samples n."""
        ...

    @property
    def outputs(self) -> int:
        """Number of outputs c."""
        ...

    @property
    def parameters(self) -> int:
        """Number of parameters P."""
        ...

    def value(self) -> Float[Tensor, "n c"]:
        """The outputs at those parameters."""
        ...

    def forward(self, v: Float[Tensor, "*k P"]) -> Float[Tensor, "*k n c"]:
        """`J v`: how the outputs move."""
        ...

    def transpose(self, u: Float[Tensor, "*k n c"]) -> Float[Tensor, "*k P"]:
        """`J^T u`: the gradient of a loss whose derivative at the outputs is u."""
        ...

    def kernel(self, u: Float[Tensor, "*k n c"]) -> Float[Tensor, "*k n c"]:
        """`J J^T u`, the tangent kernel."""
        ...

    def between(self, v: Float[Tensor, "*k P"], middle: Middle) -> Float[Tensor, "*k P"]:
        """`J^T middle(outputs, J v)`, for a `middle` that acts on every sample alone."""
        ...


class TangentMatrix:
    """J as a matrix that fits in memory.

    Args:
        matrix: (n c, P) or (n, c, P).
        value: (n, c) the outputs.
    """

    def __init__(self, matrix: Tensor, value: Float[Tensor, "n c"]) -> None:
        if matrix.numel() % max(value.numel(), 1) or matrix.flatten(0, -2).shape[0] != value.numel():
            raise complaint(
                f"a Jacobian of shape {tuple(matrix.shape)} beside outputs of shape {tuple(value.shape)}",
                "one row for each sample and output",
                "Take both from the same model, inputs and outputs.",
            )
        self.matrix = matrix.flatten(0, -2)
        self._value = value

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return self._value.shape[0]

    @property
    def outputs(self) -> int:
        """Number of outputs c."""
        return self._value.shape[1]

    @property
    def parameters(self) -> int:
        """Number of parameters P."""
        return self.matrix.shape[1]

    def at(self, samples: Int[Tensor, " b"]) -> "TangentMatrix":
        """J of some of the samples, in the order given. A copy."""
        rows = self.matrix.view(self.samples, self.outputs, -1)[samples]
        return TangentMatrix(rows, self._value[samples])

    def value(self) -> Float[Tensor, "n c"]:
        """The outputs."""
        return self._value

    def forward(self, v: Float[Tensor, "*k P"]) -> Float[Tensor, "*k n c"]:
        """`J v`. Cost: 2 n c P."""
        moved = v.to(self.matrix) @ self.matrix.T
        return moved.reshape(*v.shape[:-1], *self._value.shape).to(v)

    def transpose(self, u: Float[Tensor, "*k n c"]) -> Float[Tensor, "*k P"]:
        """`J^T u`. Cost: 2 n c P."""
        return (u.flatten(-2).to(self.matrix) @ self.matrix).to(u)

    def kernel(self, u: Float[Tensor, "*k n c"]) -> Float[Tensor, "*k n c"]:
        """`J J^T u`. Cost: 4 n c P."""
        return self.forward(self.transpose(u))

    def between(self, v: Float[Tensor, "*k P"], middle: Middle) -> Float[Tensor, "*k P"]:
        """`J^T middle(outputs, J v)`. Cost: 4 n c P."""
        return self.transpose(middle(self._value.to(v), self.forward(v)))
