"""New rows of the head fitted on frozen features before anything else trains."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.methods.base import Model, Protection, State, TaskData


class Placement(Protection):
    """Places the rows of new classes; from equal rows an adapter gets no gradient, and its first steps are noise.

    Measured on a text encoder with LoRA, placed rows cut relative drift to a third and kept old accuracy, with the new
    task learnt as well (docs of the margin-tangent forecast).

    Args:
        iterations: of L-BFGS, at most.
        ridge: weight of the squared rows, relative to the mean squared feature.
    """

    def __init__(self, *, iterations: int = 100, ridge: float = 1e-3) -> None:
        require_integer("iterations", iterations, least=1)
        require_number("ridge", ridge)
        self.iterations = iterations
        self.ridge = ridge
        self.placed: set[int] = set()

    def begin_task(self, model: Model, task: TaskData) -> None:
        """Fit the rows of the classes that no earlier task had. Cost: one pass over the task's features."""
        new = sorted(set(task.classes) - self.placed)
        self.placed |= set(new)
        if len(new) < 2:
            return  # a loss over one class determines no row
        training = model.training
        model.eval()
        with torch.no_grad():
            read = [(model.features(batch.inputs).float(), batch.labels) for batch in task.batches()]
        model.train(training)
        phi, labels = (torch.cat(part) for part in zip(*read, strict=True))
        own = torch.isin(labels, torch.tensor(new, device=labels.device))
        place_rows(model.head, phi[own], labels[own], new, iterations=self.iterations, ridge=self.ridge)

    def state_dict(self) -> State:
        """The classes whose rows are placed."""
        return {"placed": sorted(self.placed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.placed = set(state["placed"])


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
        head: has `by_output`, the names of its parameters with one row an output.
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
    names = [name for name in getattr(head, "by_output", ()) if isinstance(getattr(head, name), nn.Parameter)]
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
