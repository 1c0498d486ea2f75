r"""Per-sample gradients and Jacobians of chosen parameters of any module, layer by layer in reverse mode.

    J[i, c, :] = d outputs(model(inputs))_ic / d theta

Hooks keep what each layer was given; `torch.autograd.grad` is asked for the gradient at the layers' outputs, never at
the weights; a rule a layer contracts the two into per-sample gradients. So frozen weights cost nothing, fused attention
works, and one pass forward with c passes backward serve all samples of a chunk. What no rule covers (bare
scales, parametrised or functionally used weights) goes a general way that is slower and right for any module; see
`forgetcast.tangent.survey` for how the way is chosen, and checked on two samples.

The model is always evaluated in evaluation mode, whatever its mode is, and left as it was: mode, hooks, `requires_grad`
and `grad` included.
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.tangent.fallback import Heads
from forgetcast.tangent.passes import prepared

Choice = Sequence[str] | Callable[[str, nn.Parameter], bool] | None
"""Names of parameters, a filter of (name, parameter), or None for all that require gradients."""


def trainable(model: nn.Module, parameters: Choice = None) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in the model's order; tied parameters once.

    Args:
        model: any module.
        parameters: names, a filter of (name, parameter), or None for all that require gradients.

    Raises:
        ValueError: a name that the model does not have, or a choice that leaves nothing.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    if parameters is None:
        names = {name for name, parameter in every.items() if parameter.requires_grad}
    elif callable(parameters):
        names = {name for name, parameter in every.items() if parameters(name, parameter)}
    else:
        for name in parameters:
            if name not in every:
                near = get_close_matches(name, every, n=3, cutoff=0.3)
                remedy = f"The nearest are {near}." if near else "See `dict(model.named_parameters())`."
                raise complaint(f"got the parameter name {name!r}", "the name of a parameter of the model", remedy)
        names = set(parameters)
    chosen: dict[str, nn.Parameter] = {}
    taken: set[int] = set()
    for name, parameter in every.items():
        if name in names and id(parameter) not in taken:
            taken.add(id(parameter))
            chosen[name] = parameter
    if not chosen:
        raise complaint(
            f"a choice of parameters that leaves none of the model's {len(every)}",
            "at least one",
            "Name some, or let some require gradients.",
        )
    return chosen


def sample_gradients(
    model: nn.Module,
    inputs: Any,
    parameters: Mapping[str, nn.Parameter],
    scalars: Callable[[Any, slice], Tensor],
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "n p"], Float[Tensor, " n"]]:
    r"""Gradient of one number a sample.

        row i = d scalars(model(inputs))_i / d theta

    Args:
        model: any module whose outputs for a sample do not depend on the other samples; runs in evaluation mode.
        inputs: a tensor, or nested mappings and tuples of tensors; the sample is every tensor's first axis. A mapping
            is given to the model by name, a tuple by place.
        parameters: from `trainable`; the columns are theirs, flattened, in this order.
        scalars: `(outputs of a chunk, places of its samples) -> (samples of the chunk,)`, for instance
            `lambda logits, places: -cross_entropy(logits, labels[places], reduction="none")`. Number i may depend on
            sample i alone.
        dtype: of the rows; by default that of the parameters.
        chunk: samples that go through the model together; by default as many as fit 256 MB of activations.

    Returns:
        The rows (n, p) and the numbers (n,). A parameter that the numbers do not depend on has zeros.

    Raises:
        ValueError: inputs, numbers or parameters that do not fit; numbers that depend on none of the parameters or are
            not finite; samples that depend on each other.

    Cost: one pass forward and one backward a chunk, 2.1 forward passes with frozen weights; memory n p. Parameters
    without a rule: one further pass each way for all of them together, or a loop over samples.
    """

    def heads(outputs: Any, places: slice) -> Tensor:
        values = scalars(outputs, places)
        return values[:, None] if isinstance(values, Tensor) and values.ndim == 1 else values

    with prepared(model, inputs, parameters, heads, chunk) as work:
        if work.survey.outputs != 1:
            raise complaint(
                f"`scalars` returns {work.survey.outputs} numbers a sample", "one", "Use `jacobian` for several."
            )
        rows, values = work.explicit(dtype)
    return rows[:, 0], values[:, 0]


def jacobian(
    model: nn.Module,
    inputs: Any,
    parameters: Mapping[str, nn.Parameter],
    outputs: Callable[[Any], Tensor] | None = None,
    *,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c p"]:
    r"""Jacobian of c outputs a sample.

        J[i, c, :] = d outputs(model(inputs))_ic / d theta

    Args:
        model: as for `sample_gradients`.
        inputs: as for `sample_gradients`.
        parameters: as for `sample_gradients`.
        outputs: from what the model returns to (samples, c); by default the tensor itself, or its `logits`.
        chunk: as for `sample_gradients`.
        dtype: as for `sample_gradients`.

    Raises:
        ValueError: as for `sample_gradients`.

    Cost: one pass forward and c backward a chunk, 1 + 1.1 c forward passes with frozen weights; memory n c p.
    """
    with prepared(model, inputs, parameters, heads_of(outputs), chunk) as work:
        return work.explicit(dtype)[0]


def heads_of(outputs: Callable[[Any], Tensor] | None) -> Heads:
    """The numbers to differentiate, from a function of the model's outputs."""
    return lambda found, _: logits_of(found) if outputs is None else outputs(found)


def logits_of(found: Any) -> Any:
    """What a model returns, if it is a tensor, else its `logits`."""
    if isinstance(found, Mapping) and "logits" in found:
        return found["logits"]
    return getattr(found, "logits", found)
