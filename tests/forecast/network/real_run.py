"""The training that forecasts are held against: autograd, PyTorch's losses and optimisers, nothing of the library."""

from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.utils.data import BatchSampler, RandomSampler

import forgetcast as fc


def logits_of(model: nn.Module, inputs) -> Tensor:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found["logits"] if isinstance(found, dict) else found


def sample_order(training, count: int) -> list[list[int]]:
    """Sample indices of every step."""
    if isinstance(training, fc.GradientDescent):
        return [list(range(count))] * training.steps
    if training.order is not None:
        return [list(batch) for batch in training.order]
    generator = torch.Generator().manual_seed(training.seed)
    sampler = BatchSampler(RandomSampler(range(count), generator=generator), training.batch_size, drop_last=False)
    epochs = (batch for _ in range(training.steps) for batch in sampler)
    return list(islice(epochs, training.steps))


def loss_of(logits: Tensor, targets: Tensor, training) -> Tensor:
    outputs = logits.shape[1]
    seen = list(range(outputs)) if training.classes is None else list(training.classes)
    if training.loss == "squared":
        values = targets if targets.ndim == 2 else one_hot(targets, outputs)
        return mse_loss(logits[:, seen], values[:, seen].to(logits), reduction=training.reduction)
    if targets.ndim == 2:
        return cross_entropy(logits[:, seen], targets[:, seen], reduction=training.reduction)
    masked = torch.full_like(logits, -torch.inf)
    masked[:, seen] = logits[:, seen]
    return cross_entropy(masked, targets, reduction=training.reduction)


def optimizer_of(training, parameters) -> torch.optim.Optimizer:
    if isinstance(training, fc.AdamW):
        return torch.optim.AdamW(
            parameters, lr=1.0, betas=training.betas, eps=training.epsilon, weight_decay=training.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=1.0,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.nesterov,
    )


def really_trained(model: nn.Module, new, training) -> nn.Module:
    """A copy of the model, trained without dropout on what requires gradients, exactly as `training` says."""
    inputs, targets = new
    model = deepcopy(model).eval()
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in moving]
    optimizer = optimizer_of(training, moving)
    rates = training.learning_rate
    for step, batch in enumerate(sample_order(training, len(targets))):
        part = {name: values[batch] for name, values in inputs.items()} if isinstance(inputs, dict) else inputs[batch]
        loss = loss_of(logits_of(model, part), targets[batch], training)
        for parameter, first in zip(moving, start, strict=True):
            loss = loss + training.drift_penalty / 2 * (parameter - first).square().sum()
        optimizer.zero_grad()
        loss.backward()
        if getattr(training, "max_gradient_norm", None) is not None:
            torch.nn.utils.clip_grad_norm_(moving, training.max_gradient_norm)
        optimizer.param_groups[0]["lr"] = rates if isinstance(rates, float | int) else rates[step]
        optimizer.step()
    return model


def measured_drift(before: nn.Module, after: nn.Module, old) -> Tensor:
    """Change of the old logits from one model to another."""
    with torch.no_grad():
        return logits_of(deepcopy(after).eval(), old[0]) - logits_of(deepcopy(before).eval(), old[0])


def body_of(model: nn.Module) -> Tensor:
    """What trains outside the head, flattened."""
    own = [p.detach().flatten() for n, p in model.named_parameters() if p.requires_grad and not _of_head(model, n)]
    return torch.cat(own)


def head_of(model: nn.Module) -> nn.Linear:
    """The last layer."""
    last = model[-1] if isinstance(model, nn.Sequential) else model.head
    assert isinstance(last, nn.Linear)
    return last


def _of_head(model: nn.Module, name: str) -> bool:
    return any(dict(model.named_parameters())[name] is parameter for parameter in head_of(model).parameters())
