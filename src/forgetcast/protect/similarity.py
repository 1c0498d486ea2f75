r"""How alike two tasks are to a model: the cosine of their gradients, module by module, at the same weights.

    g_k = gradient of the cross-entropy of task k at theta_ref,     s = <g_1, g_2> / (|g_1| |g_2|)

The rows of the head are fitted on the features at these weights, so that a gradient says what the task asks of the
features: to each task its own, or to both tasks together, which makes the point common in the rows too and lets classes
that the tasks share be seen. Gradients taken at different weights, each task's at its own, are no comparison: arXiv
2602.20796 leaves open where its are taken.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from forgetcast.checks import complaint, require_choice, require_finite
from forgetcast.forecast.network.modules import Modules
from forgetcast.forecast.network.placed import place_rows
from forgetcast.methods.base import Model, TaskData
from forgetcast.modes import evaluating

Metric = Literal["cosine", "preconditioned", "signs"]
METRICS: tuple[Metric, ...] = ("cosine", "preconditioned", "signs")
RIDGE, ITERATIONS = 1e-2, 50
Values = dict[str, Tensor]
Labelled = tuple[Tensor, Int[Tensor, " _"]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a head.

    Attributes:
        head: one output a class.
        classes: (C,) their outputs, rising.
    """

    head: nn.Linear
    classes: Int[Tensor, " C"]

    def of(self, labels: Int[Tensor, " n"]) -> tuple[nn.Linear, Int[Tensor, " n"]]:
        """The rows of the labels' own classes alone, and which of them each label is.

        Raises:
            ValueError: labels without a row.
        """
        own, places = torch.unique(labels, return_inverse=True)
        missing = own[~torch.isin(own, self.classes)]
        if len(missing):
            raise complaint(
                f"labels {missing.tolist()} with rows of {self.classes.tolist()}",
                "rows of every label",
                "Fit the rows to these samples too.",
            )
        kept = torch.searchsorted(self.classes, own)
        head = _blank(self.head.in_features, len(own), self.head.weight)
        with torch.no_grad():
            head.weight.copy_(self.head.weight[kept])
            head.bias.copy_(self.head.bias[kept])
        return head.requires_grad_(False), places


def drawn(task: TaskData, most: int) -> tuple[Tensor, Int[Tensor, " n"]]:
    """Up to `most` training samples of a task and their outputs, evenly from its classes. Cost: two readings."""
    labels = torch.cat([batch.labels.cpu() for batch in task.batches()])
    by_class = torch.argsort(labels, stable=True)
    kept = by_class[torch.linspace(0, len(labels) - 1, min(most, len(labels))).round().long()].sort().values
    inputs, start = [], 0
    for batch in task.batches():
        inside = kept[(kept >= start) & (kept < start + len(batch.labels))] - start
        inputs.append(batch.inputs[inside.to(batch.inputs.device)])
        start += len(batch.labels)
    found = torch.cat(inputs)
    return found, labels[kept].to(found.device)


def point_of(network: nn.Module) -> Values:
    """Copies of the parameters that train and of the buffers beside them, such as running statistics."""
    found: Values = {}
    for name, module in network.named_modules():
        own = dict(module.named_parameters(prefix=name, recurse=False))
        if any(parameter.requires_grad for parameter in own.values()):
            found |= {key: value.detach().clone() for key, value in own.items() if value.requires_grad}
            found |= {key: value.clone() for key, value in module.named_buffers(prefix=name, recurse=False)}
    return found


@contextmanager
def standing_at(network: nn.Module, point: Mapping[str, Tensor]) -> Iterator[None]:
    """The network at other values inside; its own are put back after."""
    now = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    kept = {name: now[name].detach().clone() for name in point}
    with torch.no_grad():
        for name, value in point.items():
            now[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                now[name].copy_(value)


def fitted_rows(model: Model, *tasks: Labelled, batch_size: int = 64) -> Rows:
    """Rows fitted to all samples of the tasks together, on the features of the model as it is.

    Args:
        model: in evaluation mode throughout.
        *tasks: inputs and their outputs.
        batch_size: samples a batch.

    Raises:
        ValueError: features that are not finite.

    Cost: one pass forward.
    """
    labels = torch.cat([own for _, own in tasks])
    with evaluating(model), torch.no_grad():
        phi = torch.cat(
            [model.features(some).float() for inputs, _ in tasks for some in torch.split(inputs, batch_size)]
        )
    require_finite("features", phi)
    classes, places = torch.unique(labels, return_inverse=True)
    head = _blank(phi.shape[1], len(classes), phi)
    if len(classes) > 1:
        place_rows(head, phi, places, range(len(classes)), iterations=ITERATIONS, ridge=RIDGE)
    return Rows(head, classes)


def task_gradient(
    model: Model,
    inputs: Tensor,
    labels: Int[Tensor, " n"],
    modules: Modules,
    *,
    rows: Rows | None = None,
    metric: Metric = "cosine",
    batch_size: int = 64,
    sketch: int | None = None,
) -> Values:
    """What a task asks of each module of the backbone as it is, as a vector whose cosines are of interest.

    Args:
        model: in evaluation mode throughout; its gradients are left as they are.
        inputs: of the task.
        labels: their outputs.
        modules: of the backbone's parameters.
        rows: of the head, by default fitted to these samples. The loss is over the classes of the labels.
        metric: "cosine", the mean gradient; "preconditioned", divided by the root of its mean square over the batches,
            as Adam does; "signs", its signs.
        batch_size: samples a batch.
        sketch: numbers kept of each module, sums of its numbers with random signs (count sketch), whose cosines
            differ from those of the whole by about 1/sqrt(sketch); all by default.

    Returns:
        A vector for each module; zeros where the task has one class.

    Raises:
        ValueError: features or gradients that are not finite, labels without rows.

    Cost: two passes forward and one backward; one forward with `rows`.
    """
    require_choice("metric", metric, METRICS)
    named = dict(model.backbone.named_parameters())
    names = [name for own in modules.values() for name in own]
    wanted = [named[name] for name in names]
    standing = [parameter.requires_grad for parameter in wanted]
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in wanted]
    square = [torch.zeros_like(part) for part in total]
    batches = list(zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True))
    try:
        for parameter in wanted:
            parameter.requires_grad_(True)
        with evaluating(model):
            head, places = (rows or fitted_rows(model, (inputs, labels), batch_size=batch_size)).of(labels)
            for some, place in zip(batches, torch.split(places, batch_size), strict=True):
                with torch.enable_grad():
                    loss = cross_entropy(head(model.features(some[0]).float()), place)
                    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
                share = len(place) / len(labels)
                for mean, second, gradient in zip(total, square, gradients, strict=True):
                    if gradient is not None:
                        mean.add_(gradient, alpha=share)
                        second.addcmul_(gradient.float(), gradient.float(), value=share)
    finally:
        for parameter, trains in zip(wanted, standing, strict=True):
            parameter.requires_grad_(trains)
    parts = dict(zip(names, (_vector(*pair, metric) for pair in zip(total, square, strict=True)), strict=True))
    found = {module: torch.cat([parts[name].flatten() for name in own]) for module, own in modules.items()}
    for module, vector in found.items():
        require_finite(f"the gradient of {module}", vector)
    return found if sketch is None else {name: sketched(vector, sketch, name) for name, vector in found.items()}


def sketched(vector: Float[Tensor, " P"], numbers: int, name: str) -> Float[Tensor, " k"]:
    """A count sketch: every number goes, with a random sign, into one of `numbers` sums; drawn from the name.

    Inner products are kept on average, cosines within about 1/sqrt(numbers). Vectors shorter than that stay whole.
    """
    if len(vector) <= numbers:
        return vector
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    place = torch.randint(numbers, (len(vector),), generator=generator).to(vector.device)
    sign = (torch.randint(2, (len(vector),), generator=generator) * 2 - 1).to(vector)
    return vector.new_zeros(numbers).index_add_(0, place, sign * vector)


def cosines(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[dict[str, float], float | None]:
    """Cosine by module, and of all together; None, and no module, where either is zero or not to be compared.

    A module that one of the tasks asks nothing of has cosine 0.
    """
    if set(first) != set(second):
        return {}, None
    products = {name: float(first[name].double() @ second[name].double().to(first[name].device)) for name in first}
    sizes = [{name: float(part.double().norm()) for name, part in one.items()} for one in (first, second)]
    whole = [sum(size**2 for size in one.values()) ** 0.5 for one in sizes]
    if not all(whole):
        return {}, None
    by_module = {
        name: product / (sizes[0][name] * sizes[1][name]) if sizes[0][name] * sizes[1][name] > 0 else 0.0
        for name, product in products.items()
    }
    return by_module, sum(products.values()) / (whole[0] * whole[1])


def probe_error(model: Model, inputs: Tensor, labels: Int[Tensor, " n"], batch_size: int = 64) -> tuple[float, float]:
    """Share of samples answered wrong by rows fitted on the features of every other sample, and that of guessing.

    Raises:
        ValueError: features that are not finite.
    """
    batches = list(zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True))
    with evaluating(model), torch.no_grad():
        phi = torch.cat([model.features(some).float() for some, _ in batches])
    require_finite("features", phi)
    classes, places = torch.unique(labels, return_inverse=True)
    chance = 1 - 1 / len(classes)
    by_class = torch.argsort(places, stable=True)
    fitted, asked = by_class[::2], by_class[1::2]
    if len(classes) < 2 or len(asked) == 0:
        return 0.0, chance
    head = _blank(phi.shape[1], len(classes), phi)
    place_rows(head, phi[fitted], places[fitted], range(len(classes)), iterations=ITERATIONS, ridge=RIDGE)
    return float((head(phi[asked]).argmax(1) != places[asked]).double().mean()), chance


def _blank(width: int, classes: int, like: Tensor) -> nn.Linear:
    head = nn.Linear(width, classes, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _vector(mean: Tensor, square: Tensor, metric: Metric) -> Tensor:
    if metric == "signs":
        return mean.sign()
    return mean / (square.sqrt() + 1e-8) if metric == "preconditioned" else mean
