"""From what a pass through the model left to blocks of the tangent kernel, in the forms that the plan has chosen.

Products are taken in the model's precision (float32 at least) and added up over layers in float64.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.tangent.passes import Pass, Place, Work
from forgetcast.tangent.planner import Plan
from forgetcast.tangent.rules import Term, padded

WORKSPACE = 2**26
"""Numbers that one block of products, or of gradients built for them, may hold."""

PANELS = 4
"""A symmetric block is computed in that many panels, so that little of its lower half is."""


@dataclass(frozen=True, eq=False)
class Side:
    """What one set of samples contributes to the kernel.

    Attributes:
        samples: n.
        outputs: c.
        gradients: at the output of every use of a layer, (n, c, T, channels); left out where zero everywhere.
        terms: by parameter kept as factors, the term of every use.
        rows: by parameter kept as rows, the gradients (n, c, p); left out where zero everywhere.
    """

    samples: int
    outputs: int
    gradients: dict[Place, Tensor]
    terms: dict[str, dict[Place, Term]]
    rows: dict[str, Float[Tensor, "n c _"]]

    def places(self, name: str) -> tuple[Place, ...]:
        """The uses of a parameter kept as factors at which something arrives."""
        return tuple(place for place in self.terms.get(name, {}) if place in self.gradients)

    def built(self, name: str, samples: slice) -> Float[Tensor, "n c p"] | None:
        """Gradients of one parameter at some samples; None where they are zero everywhere."""
        if name in self.rows:
            return self.rows[name][samples]
        result = None
        for place in self.places(name):
            g, term = self.gradients[place][samples], self.terms[name][place].at(samples)
            found = torch.stack([term.rows(g[:, c]) for c in range(self.outputs)], 1)
            result = found if result is None else result.add_(found)
        return result


def collect(work: Work, plan: Plan) -> Side:
    """Go through the model once and keep what the plan says."""
    n, outputs = work.samples, work.survey.outputs
    factored = {name for name, layer in plan.layers.items() if layer.keeps == "factors"}
    side = Side(n, outputs, {}, {}, {})
    parts: list[tuple[slice, dict[str, dict[Place, Term]]]] = []
    for part in work.passes():
        parts.append((part.places, {name: terms for name, terms in part.terms.items() if name in factored}))
        for name, found in part.general.items():
            _room(side.rows, name, n, outputs, found[:, 0])[part.places] = found
        _backwards(part, side, factored)
    for name in factored:
        pieces = [(places, terms[name]) for places, terms in parts if name in terms]
        if name in side.rows:  # some chunk took another way through the model: all of this parameter becomes rows
            for places, terms in pieces:
                g = {
                    place: padded(side.gradients[place][places, :, : term.tokens or None], 2, term.tokens)
                    for place, term in terms.items()
                    if place in side.gradients
                }
                built = Side(n, outputs, g, {name: terms}, {}).built(name, slice(None))
                side.rows[name][places] = 0 if built is None else built
        elif pieces:
            (_, first), *others = pieces
            joined = {place: term.joined([t[place] for _, t in others]) for place, term in first.items()}
            side.terms[name] = joined
            for place in joined.keys() & side.gradients.keys():  # the longest inputs may have had no gradient
                side.gradients[place] = padded(side.gradients[place], 2, joined[place].tokens)
    return side


def _backwards(part: Pass, side: Side, factored: set[str]) -> None:
    watched = {place for name in factored for place in part.terms.get(name, ())}
    for c in range(side.outputs):
        g = part.backward(c)
        for place in watched & g.keys():
            length = g[place].shape[1]
            room = _room(side.gradients, place, side.samples, side.outputs, g[place])
            side.gradients[place] = room = padded(room, 2, length)  # lengths of texts may differ between chunks
            room[part.places, c, :length] = g[place]
        for name, terms in part.terms.items():
            for place in terms.keys() & g.keys() if name not in factored else ():
                found = terms[place].rows(g[place])
                _room(side.rows, name, side.samples, side.outputs, found)[part.places, c] += found


def _room(store: dict[Any, Tensor], key: Any, samples: int, outputs: int, like: Tensor) -> Tensor:
    """Zeros (samples, outputs, ...) for entries like `like` (some samples, ...), made when first asked for."""
    if key not in store:
        kind = torch.promote_types(like.dtype, torch.float32)
        store[key] = torch.zeros(samples, outputs, *like.shape[1:], dtype=kind, device=like.device)
    return store[key]


def block(
    a: Side, b: Side, plan: Plan, chosen: Collection[str] | None = None, *, trace: bool, device: torch.device
) -> Float[Tensor, "n c m c"]:
    """The kernel of two sides; (n, 1, m, 1), summed over equal outputs, if `trace`. Symmetric if they are the same.

    `chosen` are the parameters whose kernel it is; None for all.
    """
    c = 1 if trace else a.outputs
    K = torch.zeros(a.samples, c, b.samples, c, dtype=torch.float64, device=device)
    grams: dict[tuple[tuple[Place, ...], tuple[Place, ...]], list[str]] = {}
    # rows may also hold a parameter that the surveyed samples did not meet
    for name in dict.fromkeys([*plan.layers, *a.rows, *b.rows]):
        if chosen is not None and name not in chosen:
            continue
        if name in a.terms and name in b.terms and plan.layers[name].form == "gram":
            grams.setdefault((a.places(name), b.places(name)), []).append(name)
        else:
            parameters = plan.layers[name].parameters if name in plan.layers else 1
            _fill(K, a is b, *_explicit(a, b, name, parameters, trace=trace))
    for (left, right), names in grams.items():
        for u in left:
            for v in right:
                _fill(K, a is b, *_gram(a, b, names, u, v, trace=trace))
    if a is b:
        square = K.view(a.samples * c, -1)
        for i in _slices(0, len(square), _panel(a.samples) * c):
            corner = square[i, i].triu()
            square[i, i] = corner + corner.triu(1).T
            square[i.stop :, i] = square[i, i.stop :].T
    return K


Product = Callable[[slice, slice], Tensor | None]


def _fill(K: Tensor, symmetric: bool, most: int, product: Product) -> None:
    """Add `product(i, j)` to blocks of K, at most that many samples each; from the diagonal panels on if symmetric."""
    panel = _panel(len(K)) if symmetric else len(K)
    for rows in _slices(0, len(K), panel):
        for i in _slices(rows.start, rows.stop, max(1, most)):
            for j in _slices(rows.start if symmetric else 0, K.shape[2], max(1, most)):
                found = product(i, j)
                if found is not None:
                    K[i, :, j] += found


def _panel(samples: int) -> int:
    return -(-samples // PANELS)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for place in range(start, stop, step):
        yield slice(place, min(place + step, stop))


def _explicit(a: Side, b: Side, name: str, parameters: int, *, trace: bool) -> tuple[int, Product]:
    # gradients that fit are built once, not again for every block
    fit = max(a.samples, b.samples) * a.outputs * parameters <= WORKSPACE
    rows = a.built(name, slice(None)) if fit else None
    columns = rows if a is b else b.built(name, slice(None)) if fit else None

    def product(i: slice, j: slice) -> Tensor | None:
        if fit:
            left, right = (None if part is None else part[k] for part, k in ((rows, i), (columns, j)))
        else:
            left, right = a.built(name, i), b.built(name, j)
        if left is None or right is None:
            return None
        if trace:
            return (left.flatten(1) @ right.flatten(1).T)[:, None, :, None]
        return (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])

    at_once = int(WORKSPACE**0.5) // a.outputs
    builds = name not in a.rows or name not in b.rows
    return min(at_once, WORKSPACE // (a.outputs * parameters)) if builds else at_once, product


def _gram(a: Side, b: Side, names: list[str], u: Place, v: Place, *, trace: bool) -> tuple[int, Product]:
    """`sum_ts (sum over names of x_it . x_js) (g_ict . g_jds)` for one use on either side."""
    left, right = a.gradients[u], b.gradients[v]
    T, S = left.shape[2], right.shape[2]

    def product(i: slice, j: slice) -> Tensor:
        inputs = sum(a.terms[name][u].at(i).gram(b.terms[name][v].at(j)) for name in names)
        g, h = left[i], right[j]
        if not isinstance(inputs, Tensor):  # a bias alone
            inputs = g.new_full((1, 1, 1, 1), inputs)
        if trace:
            products = g.transpose(1, 2).flatten(2).flatten(0, 1) @ h.transpose(1, 2).flatten(2).flatten(0, 1).T
            return (products.view(len(g), T, len(h), S) * inputs).sum((1, 3))[:, None, :, None]
        products = (g.flatten(0, 2) @ h.flatten(0, 2).T).view(len(g), a.outputs, T, len(h), b.outputs, S)
        weighted = products.mul_(inputs[:, None, :, :, None])
        return weighted[:, :, 0, :, :, 0] if T == S == 1 else weighted.sum((2, 5))

    return int((WORKSPACE / (T * S * (1 if trace else a.outputs**2))) ** 0.5), product
