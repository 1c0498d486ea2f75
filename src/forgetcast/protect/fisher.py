r"""The Fisher information of what a model predicts, through its square roots at the outputs.

    F = E_x sum_k (J^T r_k) (J^T r_k)^T,      J = df / dtheta (C x P),      r_k (C) from `output_scores`

so that the diagonal and the Kronecker form need backward passes only.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import one_hot

from forgetcast.checks import require_choice
from forgetcast.protect.layers import LINEAR, bias_of, linear_layers, recorded, weight_of
from forgetcast.protect.parameters import trainable

FISHERS = ("exact", "sampled", "empirical")
LIKELIHOODS = ("categorical", "gaussian")


def require_fisher(fisher: str, likelihood: str) -> None:
    """Raise unless both are known."""
    require_choice("fisher", fisher, FISHERS)
    require_choice("likelihood", likelihood, LIKELIHOODS)


def output_scores(
    logits: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    outputs: Sequence[int],
    *,
    fisher: str = "exact",
    likelihood: str = "categorical",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "k n C"]:
    r"""Vectors `r_k` whose outer products sum to the Fisher of each sample's outputs.

                    categorical                     gaussian (unit variance)
        exact       sqrt(p_c) (e_c - p), each c     e_c, each c                      E over the model's labels
        sampled     e_y - p,  y ~ p                 noise ~ N(0, 1)                  one draw of it
        empirical   e_y - p,  y the label           e_y - f                          not a Fisher (arXiv 1905.12558)

    Args:
        logits: f, of all outputs.
        labels: outputs; read by "empirical" alone.
        outputs: outputs that the softmax runs over; the scores of others are 0.
        fisher: "exact", "sampled" or "empirical".
        likelihood: "categorical" or "gaussian".
        generator: on the CPU, for "sampled".

    Returns:
        k = number of outputs for "exact", else 1.

    Cost: O(k n C) memory; each k costs its user one backward pass.
    """
    known = list(outputs)
    kept = logits.detach()[:, known]
    count = len(known)
    targets = torch.zeros_like(kept)
    if fisher == "empirical":
        place = torch.full((logits.shape[1],), -1, dtype=torch.int64, device=logits.device)
        place[known] = torch.arange(count, device=logits.device)
        targets = one_hot(place[labels], count).to(kept)
    if likelihood == "gaussian":
        if fisher == "exact":
            scores = torch.eye(count).to(kept)[:, None, :].expand(count, len(kept), count)
        elif fisher == "sampled":
            scores = torch.randn(1, *kept.shape, generator=generator).to(kept)
        else:
            scores = (targets - kept)[None]
    else:
        p = kept.softmax(1)
        if fisher == "exact":
            scores = p.T.sqrt()[:, :, None] * (torch.eye(count).to(p)[:, None, :] - p[None])
        else:
            if fisher == "sampled":
                drawn = torch.multinomial(p.float().cpu(), 1, generator=generator)[:, 0]
                targets = one_hot(drawn, count).to(p)
            scores = (targets - p)[None]
    result = logits.new_zeros(len(scores), *logits.shape)
    result[:, :, known] = scores
    return result


def squared_gradients(
    model: nn.Module, inputs: Tensor, scores: Float[Tensor, "k n C"], samples_at_once: int = 16
) -> dict[str, Tensor]:
    r"""`sum_n sum_k (J_n^T r_kn)^2` for each trainable parameter, elementwise, at least in float32.

    The gradient of one sample is `g a^T` for a linear layer used once, a what goes in and g the gradient at what comes
    out, so that its square is `g^2 (a^2)^T`: no gradient of a single sample is formed, and g comes from ordinary
    backward passes. Where a sample has several positions (tokens) its gradient is the sum over them, and is formed, as
    it is for every other parameter.

    Args:
        model: in evaluation mode, in which no sample depends on another.
        inputs: (n, ...).
        scores: from `output_scores`.
        samples_at_once: gradients of that many samples are in memory together, where they are formed.

    Cost: k backward passes over the samples; memory of one pass, and samples_at_once x parameters where gradients of
    single samples are formed.
    """
    layers = _layers_of_their_own(model)
    with torch.no_grad(), recorded(layers) as uses:
        model(inputs[:1])
    # with as many positions as samples, only one sample alone tells whether the first axis is the samples
    candidates = {name: layers[name] for name, use in uses.items() if len(use) == 1 and len(use[0][1]) == 1}
    with torch.enable_grad(), recorded(candidates) as uses:
        logits = model(inputs)
    once = {name: use[0] for name, use in uses.items() if len(use) == 1 and len(use[0][1]) == len(inputs)}
    total = _of_linear_layers({name: layers[name] for name in once}, once, logits, scores, samples_at_once)
    values = {name: parameter.detach() for name, parameter in trainable(model).items() if name not in total}
    return {**total, **(_of_single_samples(model, values, inputs, scores, samples_at_once) if values else {})}


def _layers_of_their_own(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers that do nothing else and share no parameter with another module."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        name: layer
        for name, layer in linear_layers(model).items()
        if type(layer) in LINEAR and all(owners[id(p)] == 1 for p in layer.parameters())
    }


def _of_linear_layers(
    layers: Mapping[str, nn.Module],
    uses: Mapping[str, tuple[Tensor, Tensor]],
    logits: Float[Tensor, "n C"],
    scores: Float[Tensor, "k n C"],
    samples_at_once: int,
) -> dict[str, Tensor]:
    weights = {name: weight_of(layer) for name, layer in layers.items()}
    biases = {name: bias for name, layer in layers.items() if (bias := bias_of(layer)) is not None}
    squares = {name: torch.zeros_like(weight, dtype=wide(weight)) for name, weight in weights.items()}
    bias_squares = {name: torch.zeros_like(bias, dtype=wide(bias)) for name, bias in biases.items()}
    at_outputs = {name: torch.zeros_like(output, dtype=wide(output)) for name, (_, output) in uses.items()}
    for score in scores if layers else ():
        gradients = torch.autograd.grad(
            logits, [output for _, output in uses.values()], score, retain_graph=True, materialize_grads=True
        )
        for name, gradient in zip(uses, gradients, strict=True):
            g = gradient.to(squares[name])
            if g.ndim == 2:
                at_outputs[name] += g.square()
                continue
            a = uses[name][0].to(g).flatten(1, -2)  # (n, positions, inputs)
            g = g.flatten(1, -2)  # (n, positions, outputs)
            for start in range(0, len(a), samples_at_once):
                rows = slice(start, start + samples_at_once)
                squares[name] += (g[rows].mT @ a[rows]).square().sum(0)
            if name in biases:
                bias_squares[name] += g.sum(1).square().sum(0)
    for name, square in at_outputs.items():
        if square.ndim == 2:
            squares[name] += square.T @ uses[name][0].to(square).square()
            if name in biases:
                bias_squares[name] += square.sum(0)
    return {
        **{f"{name}.weight": value for name, value in squares.items()},
        **{f"{name}.bias": value for name, value in bias_squares.items() if biases[name].requires_grad},
    }


def _of_single_samples(
    model: nn.Module,
    values: dict[str, Tensor],
    inputs: Tensor,
    scores: Float[Tensor, "k n C"],
    samples_at_once: int,
) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(value, dtype=wide(value)) for name, value in values.items()}

    def scored(values: dict[str, Tensor], sample: Tensor, score: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, values, (sample[None],))
        return (logits[0] * score).sum()

    gradients = vmap(grad(scored), in_dims=(None, 0, 0))
    for start in range(0, len(inputs), samples_at_once):
        rows = slice(start, start + samples_at_once)
        for score in scores:
            for name, gradient in gradients(values, inputs[rows], score[rows]).items():
                total[name] += gradient.to(total[name]).square().sum(0)
    return total


def wide(values: Tensor) -> torch.dtype:
    """The dtype to sum in: the tensor's own, at least float32."""
    return torch.promote_types(values.dtype, torch.float32)
