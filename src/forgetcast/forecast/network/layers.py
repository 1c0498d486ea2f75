r"""Which layers carry a forecast drift, and how far each layer's tangent kernel moves along the way."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.forecast.network.head import Network
from forgetcast.forecast.network.result import NetworkForecast
from forgetcast.forecast.network.samples import Samples, samples_of
from forgetcast.forecast.network.walker import Place
from forgetcast.tangent.kernel import grouped_trace_kernels

Groups = Callable[[str], str]
Group = dict[str, nn.Parameter]


def block_of(name: str) -> str:
    """The block of a stack that a parameter belongs to, its name up to the last number; without one, its module.

    Examples:
        >>> block_of("encoder.layer.3.attention.query.lora_A.default.weight"), block_of("head.bias"), block_of("prompt")
        ('encoder.layer.3', 'head', 'prompt')
    """
    *owners, _ = name.split(".")
    numbered = [place for place, part in enumerate(owners) if part.isdigit()]
    return ".".join(owners[: numbered[-1] + 1] if numbered else owners) or name


def drift_by_layer(model: nn.Module, old: Any, forecast: NetworkForecast, *, groups: Groups = block_of) -> pd.DataFrame:
    r"""Which layers carry the forecast drift: each alone at its predicted end, and all but each.

        alone = drift(theta_0 + delta_g),      missing = drift(theta_0 + delta - delta_g),
        share = <alone, drift> / ||drift||^2

    Where layers do not act together, the shares add up to 1.

    Args:
        model: that was forecast; it may have been trained since. What trains is put to the forecast's start and ends,
            and back.
        old: the old samples that were forecast.
        forecast: of a network, by any estimator.
        groups: from the name of a parameter to that of its group; by default the blocks of a stack.

    Returns:
        A row for each group, as it stands in the model: `parameters` in it; how far they move relative to their size,
        `moved`; `share`; `alone` and `missing`, sizes of these drifts relative to the whole, and their cosines with it,
        `alone_cosine` and `missing_cosine` (NaN where nothing drifts).

    Raises:
        ValueError: another model, or other samples, than those that were forecast.

    Cost: 2 + 2 passes a group over the old samples, forward.
    """
    net = _network(model, forecast)
    samples = samples_of("old", old).to(net.device)
    start, end = _values(net, forecast.start), _values(net, forecast.end)
    with net.restored():
        _put(net, start)
        _require_same(net.features(samples), forecast.readings[0].features)
        before = _logits(net, samples, start)
        whole = _logits(net, samples, end) - before
        rows = []
        for group, names in _parts(net, groups).items():
            alone = _logits(net, samples, start | {name: end[name] for name in names}) - before
            missing = _logits(net, samples, end | {name: start[name] for name in names}) - before
            was, now = (torch.cat([values[name] for name in names]) for values in (start, end))
            rows.append(
                {
                    "group": group,
                    "parameters": len(was),
                    "moved": _ratio(float((now - was).norm()), float(was.norm())),
                    "share": _ratio(float((alone * whole).sum()), float(whole.square().sum())),
                    "alone": _ratio(float(alone.norm()), float(whole.norm())),
                    "alone_cosine": _cosine(alone, whole),
                    "missing": _ratio(float(missing.norm()), float(whole.norm())),
                    "missing_cosine": _cosine(missing, whole),
                }
            )
    return pd.DataFrame(rows).set_index("group")


def kernel_movement(
    model: nn.Module,
    samples: Any,
    forecast: NetworkForecast,
    *,
    groups: Groups = block_of,
    probes: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""How far the tangent kernel of some samples moves from the forecast's start to its predicted end.

    With K the trace kernel, mean over outputs, of one group's parameters, and H = I - 1/n,

        change = ||K_end - K_start|| / ||K_start||,       alignment = <K_end, K_start> / (||K_end|| ||K_start||),

    `centred` the alignment of H K H, known as CKA. A forecast from one tangent needs a change near 0; features are
    learnt where the alignment falls.

    Args:
        model: as for `drift_by_layer`.
        samples: inputs, with or without targets; some dozens are enough.
        forecast: as for `drift_by_layer`.
        groups: as for `drift_by_layer`.
        probes: as for `trace_kernel`.
        seed: of the probes.

    Returns:
        A row for each group and one, "all", for their sum: `before` and `after`, norms of K; `change` (infinite where
        the kernel is zero at the start, as that of LoRA's first factor); `alignment` and `centred` (NaN where a kernel
        is zero).

    Raises:
        ValueError: another model than that which was forecast; samples that do not fit.

    Cost: two trace kernels, 2 (1 + 1.1 probes) passes forward over the samples.
    Source: kernel distance of Fort et al., arXiv 2010.15110; CKA of Kornblith et al., arXiv 1905.00414.
    """
    net = _network(model, forecast)
    inputs = samples_of("samples", samples).to(net.device).inputs
    parts = _parts(net, groups)
    kernels = []
    for place in (forecast.start, forecast.end):
        with net.restored():
            _put(net, _values(net, place))
            kernels.append(grouped_trace_kernels(model, inputs, parts, outputs=net.read, probes=probes, seed=seed))
    pairs = {name: (kernels[0][name], kernels[1][name]) for name in parts}
    pairs["all"] = tuple(torch.stack(list(found.values())).sum(0) for found in kernels)  # type: ignore[assignment]
    rows = []
    for name, (was, now) in pairs.items():
        sizes = float(was.norm()), float(now.norm())
        rows.append(
            {
                "group": name,
                "before": sizes[0],
                "after": sizes[1],
                "change": _ratio(float((now - was).norm()), sizes[0]),
                "alignment": _cosine(was, now),
                "centred": _cosine(_centred(was), _centred(now)),
            }
        )
    return pd.DataFrame(rows).set_index("group")


def _network(model: nn.Module, forecast: NetworkForecast) -> Network:
    net = forecast._net
    if net.model is not model:
        raise complaint(
            f"a {type(model).__name__} that is not the model of the forecast",
            "the very model that was given to `forecast`",
            "Give that model, not a copy; it may have been trained since.",
        )
    return net


def _parts(net: Network, groups: Groups) -> dict[str, Group]:
    """What trains, by group, in the model's order."""
    chosen = {id(parameter) for parameter in (*net.body.values(), *net.of_head.values())}
    parts: dict[str, Group] = {}
    for name, parameter in net.model.named_parameters():
        if id(parameter) in chosen:
            parts.setdefault(groups(name), {})[name] = parameter
    return parts


def _values(net: Network, place: Place) -> dict[str, Float[Tensor, " _"]]:
    """What trains, by name in the model, flattened, at a place."""
    sizes = [parameter.numel() for parameter in net.body.values()]
    found = dict(zip(map(id, net.body.values()), torch.split(place.theta, sizes), strict=True))
    found |= {id(parameter): getattr(place, name).flatten() for name, parameter in net.of_head.items()}
    return {name: found[id(parameter)] for name, parameter in net.model.named_parameters() if id(parameter) in found}


def _put(net: Network, values: dict[str, Tensor]) -> None:
    own = dict(net.model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value.view_as(own[name]))


def _logits(net: Network, old: Samples, values: dict[str, Tensor]) -> Float[Tensor, "n C"]:
    _put(net, values)
    return (net.features(old) @ net.weight().T + net.bias()).double()


def _require_same(found: Tensor, told: Tensor) -> None:
    same = found.shape == told.shape
    if not same or float((found - told).norm()) > torch.finfo(found.dtype).eps ** 0.5 * float(told.norm()):
        raise complaint(
            f"old samples with other features at the forecast's start, of shape {tuple(found.shape)}, than the "
            f"forecast's, {tuple(told.shape)}",
            "the old samples that were forecast, and a model whose frozen parts and buffers are as they were then",
            "Give the same `old`; undo what else has changed in the model.",
        )


def _centred(kernel: Tensor) -> Tensor:
    rows = kernel - kernel.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return float("inf") if part != 0 else 0.0
    return part / whole


def _cosine(left: Tensor, right: Tensor) -> float:
    size = float(left.norm() * right.norm())
    return float((left * right).sum()) / size if size > 0 else float("nan")
