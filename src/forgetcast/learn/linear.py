"""Train a linear head for real: `torch.nn.Linear`, autograd, PyTorch's own optimiser. Knows nothing of forecasts."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from forgetcast.checks import complaint
from forgetcast.forecast.penalty import QuadraticPenalty
from forgetcast.forecast.simulate import batches
from forgetcast.forecast.training import SGD, AdamW, GradientDescent, clip_gradients, rate_at, sgd
from forgetcast.tangent.features import check_targets
from forgetcast.tangent.linear_head import LinearHead


def train_linear_head(
    phi: Float[Tensor, "n d"],
    y: Tensor,
    head: LinearHead,
    training: GradientDescent | SGD | AdamW,
    penalty: QuadraticPenalty | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> LinearHead:
    """Train a copy of `head` on frozen features, exactly as `training` says, and return it.

    Args:
        phi: (n, d) features.
        y: (n,) labels or (n, C) targets.
        head: the start; it is left as it is.
        training: optimiser, steps, loss.
        penalty: a quadratic penalty added to the loss.
        on_step: called after every step (a progress bar).

    Raises:
        ValueError: targets that do not fit the head, a training that ends in NaN or infinity.

    Cost a step: 6 b d C, by autograd.
    """
    y = check_targets("training targets", y, head.outputs).to(phi.device)
    module = nn.Linear(head.width, head.outputs, bias=head.bias is not None, dtype=phi.dtype, device=phi.device)
    with torch.no_grad():
        module.weight.copy_(head.weight.T)
        if head.bias is not None:
            module.bias.copy_(head.bias)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    parameters: list[Tensor] = list(module.parameters())
    optimizer = sgd(training, parameters) if isinstance(training, GradientDescent) else training.optimizer(parameters)
    order = None if isinstance(training, GradientDescent) else batches(training, len(phi))
    for step in range(training.steps):
        batch = slice(None) if order is None else next(order)
        optimizer.param_groups[0]["lr"] = rate_at(training.learning_rate, step)
        optimizer.zero_grad()
        loss = _loss(module(phi[batch]), y[batch], training)
        for parameter, anchor in zip(parameters, start, strict=True):
            loss = loss + training.drift_penalty / 2 * (parameter - anchor).square().sum()
        if penalty is not None:
            rows = [module.weight.T] if head.bias is None else [module.weight.T, module.bias[None]]
            gap = penalty.root.to(phi) @ torch.cat(rows) - penalty.target.to(phi)
            loss = loss + gap.square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(training, parameters)
        optimizer.step()
        on_step()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise complaint(
            f"the training diverged within {training.steps} steps", "finite weights", "Lower the learning rate."
        )
    return LinearHead.from_module(module)


def _loss(logits: Tensor, y: Tensor, training: GradientDescent | SGD | AdamW) -> Tensor:
    outputs = logits.shape[1]
    seen = sorted(training.classes) if training.classes is not None else list(range(outputs))
    if training.loss == "squared":
        target = functional.one_hot(y, outputs).to(logits) if y.ndim == 1 else y.to(logits)
        return functional.mse_loss(logits[:, seen], target[:, seen], reduction=training.reduction)
    if y.ndim == 2:
        return functional.cross_entropy(logits[:, seen], y[:, seen].to(logits), reduction=training.reduction)
    place = torch.full((outputs,), -1, device=y.device)
    place[seen] = torch.arange(len(seen), device=y.device)
    return functional.cross_entropy(logits[:, seen], place[y], reduction=training.reduction)
