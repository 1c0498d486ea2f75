"""Shared builders: prescribed spectra, awkward tasks, and the slow obvious training that forecasts are held against."""

import torch
from torch import Tensor, nn

import forgetcast as fc

DOUBLE = torch.float64


def features(rows: int, width: int, *, decay: float = 1.0, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Features with singular values proportional to `(1, 2, ...)^-decay`."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, width)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=DOUBLE)).Q
    right = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=DOUBLE)).Q
    values = torch.arange(1, count + 1, dtype=DOUBLE) ** -decay
    return (left * values @ right.T * rows**0.5).to(dtype)


def labels(rows: int, low: int, high: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (rows,), generator=torch.Generator().manual_seed(seed + 999))


def head(width: int, outputs: int, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = DOUBLE) -> fc.LinearHead:
    generator = torch.Generator().manual_seed(seed + 77)
    weight = torch.randn(width, outputs, generator=generator, dtype=DOUBLE) / width**0.5
    vector = torch.randn(outputs, generator=generator, dtype=DOUBLE) if bias else None
    return fc.LinearHead(weight.to(dtype), None if vector is None else vector.to(dtype))


def train(phi: Tensor, y: Tensor, start: fc.LinearHead, training, order=None, extra=None) -> fc.LinearHead:
    """Really train a `torch.nn.Linear` with autograd and a PyTorch optimiser, exactly as `training` says."""
    module = nn.Linear(start.width, start.outputs, bias=start.bias is not None, dtype=phi.dtype)
    with torch.no_grad():
        module.weight.copy_(start.weight.T)
        if start.bias is not None:
            module.bias.copy_(start.bias)
    anchors = [p.detach().clone() for p in module.parameters()]
    if isinstance(training, fc.AdamW):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            module.parameters(), betas=training.betas, eps=training.epsilon, weight_decay=training.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            module.parameters(),
            lr=1.0,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            nesterov=training.nesterov,
        )
    seen = list(training.classes) if training.classes is not None else list(range(start.outputs))
    for step in range(training.steps):
        batch = slice(None) if order is None else torch.as_tensor(order[step])
        rates = training.learning_rate
        optimizer.param_groups[0]["lr"] = rates if isinstance(rates, float | int) else rates[step]
        optimizer.zero_grad()
        logits, target = module(phi[batch])[:, seen], y[batch]
        if training.loss == "squared":
            if target.ndim == 1:
                target = torch.nn.functional.one_hot(target, start.outputs).to(phi.dtype)
            loss = torch.nn.functional.mse_loss(logits, target[:, seen], reduction=training.reduction)
        else:
            if target.ndim == 1:
                place = torch.zeros(start.outputs, dtype=torch.int64)
                place[seen] = torch.arange(len(seen))
                target = place[target]
            else:
                target = target[:, seen]
            loss = torch.nn.functional.cross_entropy(logits, target, reduction=training.reduction)
        for parameter, anchor in zip(module.parameters(), anchors, strict=True):
            loss = loss + training.drift_penalty / 2 * (parameter - anchor).square().sum()
        if extra is not None:
            loss = loss + extra(module)
        loss.backward()
        if getattr(training, "max_gradient_norm", None) is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), training.max_gradient_norm)
        optimizer.step()
    return fc.LinearHead.from_module(module)


def measured_drift(phi: Tensor, before: fc.LinearHead, after: fc.LinearHead) -> Tensor:
    return after.logits(phi) - before.logits(phi)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))


def dense_jacobian(model: nn.Module, inputs, parameters, read=None) -> tuple[Tensor, Tensor]:
    """J (n, c, P) by one backward pass for each number, and the outputs (n, c)."""
    model.eval()
    if isinstance(inputs, dict):
        answer = model(**inputs)
    else:
        answer = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if read is None and not isinstance(answer, Tensor):
        answer = answer["logits"]
    outputs = answer if read is None else read(answer)
    rows = []
    for value in outputs.flatten():
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows).view(*outputs.shape, -1), outputs.detach()
