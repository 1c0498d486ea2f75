"""New rows of a head fitted on frozen features before anything else trains: a start that has a tangent."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from forgetcast.checks import complaint


def place_rows(
    head: nn.Module,
    phi: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    outputs: Sequence[int],
    *,
    iterations: int = 100,
    ridge: float = 1e-3,
) -> None:
    r"""Fit the rows `outputs` of a head by cross-entropy over these outputs alone; every other row stays as it is.

        min  mean_i CE(head(phi_i)[outputs], y_i) + ridge mean(phi^2) / 2 ||rows||^2        (L-BFGS, deterministic)

    Args:
        head: an `nn.Linear`, or a module with `by_output`, the names of its parameters with one row an output.
        phi: (n, d) features.
        labels: (n,) outputs, all among `outputs`.
        outputs: the rows to fit.
        iterations: of L-BFGS, at most.
        ridge: see above.

    Raises:
        ValueError: a label that is not among `outputs`, a head without such parameters, rows that end not finite.

    Source: theory of the placed head, derived for the margin-tangent forecast.
    """
    rows = torch.tensor(sorted(outputs), device=phi.device)
    place = torch.searchsorted(rows, labels)
    if not bool(torch.isin(labels, rows).all()):
        raise complaint(f"labels outside {sorted(outputs)}", "labels among the outputs to place", "Select them first.")
    known = ("weight", "bias") if isinstance(head, nn.Linear) else ()
    names = [name for name in getattr(head, "by_output", known) if isinstance(getattr(head, name), nn.Parameter)]
    if not names:
        raise complaint(
            f"a {type(head).__name__} without rows that train", "a linear or cosine head", "Leave new rows fresh."
        )
    fixed = {name: getattr(head, name).detach() for name in names}
    free = [value[rows].clone().requires_grad_() for value in fixed.values()]
    strength = ridge * float(phi.square().mean())
    optimizer = torch.optim.LBFGS(free, max_iter=iterations, line_search_fn="strong_wolfe")

    def values() -> dict[str, Tensor]:
        return {name: value.index_put((rows,), own) for (name, value), own in zip(fixed.items(), free, strict=True)}

    def closure() -> Tensor:
        logits = functional_call(head, values(), (phi,))
        size = torch.stack([own.square().sum() for own in free]).sum()
        loss = cross_entropy(logits[:, rows], place) + strength / 2 * size
        for own, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
            own.grad = gradient  # of the rows alone: backward would leave one on the scale of a cosine head
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    if not all(bool(torch.isfinite(own).all()) for own in free):
        raise complaint("rows that are not finite after placing", "finite rows", "Normalise the features.")
    with torch.no_grad():
        for name, own in zip(names, free, strict=True):
            getattr(head, name)[rows] = own
