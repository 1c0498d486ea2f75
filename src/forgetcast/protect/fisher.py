r"""The Fisher information of what a model predicts, through its square roots at the outputs.

    F = E_x sum_k (J^T r_k) (J^T r_k)^T,      J = df / dtheta (C x P),      r_k (C) from `output_scores`

so that the diagonal and the Kronecker form need backward passes only.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import one_hot

from forgetcast.checks import require_choice
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
    """`sum_n sum_k (J_n^T r_kn)^2` for each trainable parameter, elementwise, at least in float32.

    Args:
        model: in evaluation mode.
        inputs: (n, ...).
        scores: from `output_scores`.
        samples_at_once: gradients of that many samples are in memory together.

    Cost: k backward passes over the samples; memory samples_at_once x parameters.
    """
    values = {name: parameter.detach() for name, parameter in trainable(model).items()}
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
