r"""The spectral regulariser of a network: old outputs are held still along their vulnerable modes, and only there.

    probes      (mu / k) sum_tau sum_{j<=k} ( u_j^T [f_tau(theta) - f_tau^ref] )^2
    data-free   (mu / k) sum_tau || S_tau (theta - theta_tau) ||^2,      S_tau = U_k^T J_tau = Sigma_k V_k^T

u_j are the leading eigenvectors of the tangent kernel of all that trains, over probes and outputs seen, taken when task
tau ends; they stay. The data-free form is the first to first order in the displacement, and the same where outputs are
linear in what trains. Source: arXiv 2606.18024.

Outputs that come later are no part of f_tau. With `later="free"` they may become anything on the old probes, and where
predictions are over all outputs seen they outvote the old ones. With `later="held"` each is held at the zero that it
starts from, along the leading k / c modes of its own kernel, as it would be in a head that had all outputs from the
start; `SpectralHead` does so too.

Along mode j either form adds a curvature of `2 mu l_j / k`, and l_j grows with the number of probes: plain gradient
descent is stable below a rate of `k / (mu l_1)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_choice, require_integer, require_number
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.protect.parameters import leading, padded
from forgetcast.protect.spectral_head import stacked
from forgetcast.protect.vulnerable import (
    balanced_probes,
    comparable_logits,
    tangent_of,
    tangent_of_later,
    vulnerable_modes,
)
from forgetcast.tangent.jacobian import trainable


@dataclass(frozen=True, eq=False)
class HeldProbes:
    """What a finished task leaves behind in the form with probes.

    Attributes:
        inputs: (n, ...) the probes.
        patterns: u_j (k, n, c), orthonormal.
        reference: f_ref (n, c).
        later: (m, n) modes of an output that came later; none where these are free.
        outputs: the c outputs seen when the task ended.
    """

    inputs: Float[Tensor, " n *shape"]
    patterns: Float[Tensor, "k n c"]
    reference: Float[Tensor, "n c"]
    later: Float[Tensor, "m n"]
    outputs: tuple[int, ...]

    def energy(self, model: Model) -> Float[Tensor, ""]:
        """The task's part of the penalty now, for mu = 1. Cost: a pass of the probes, and 2 k n c."""
        device = next(model.parameters()).device
        logits = comparable_logits(model, self.inputs.to(device)).to(self.reference.dtype)
        gap = logits[:, list(self.outputs)] - self.reference.to(device)
        along = self.patterns.to(device).flatten(1) @ gap.flatten()
        beside = self.later.to(device) @ logits[:, _others(self.outputs, logits.shape[1])]
        return (along.square().sum() + beside.square().sum()) / len(along)


class SpectralProbes(Protection):
    """The form with probes, for any network.

    Args:
        strength: mu.
        modes: k; more than a task has outputs on its probes means all of them, which is distillation of all outputs.
        probes: training samples kept of each task, balanced over labels.
        later: outputs that come later are "held" on the old probes, or "free".
        seed: of the choice of probes.

    Attributes:
        held: what each finished task left behind.

    Cost: at every step a pass forwards and backwards of all probes of all finished tasks: each u_j mixes all probes of
    its task, so that a minibatch of them would not do. Memory a task: its probes and k n c numbers.
    """

    def __init__(
        self, strength: float = 0.3, modes: int = 100, *, probes: int = 100, later: str = "held", seed: int = 0
    ) -> None:
        _require(strength, modes, probes, later)
        self.strength = strength
        self.modes = modes
        self.probes = probes
        self.later = later
        self.seed = seed
        self.held: list[HeldProbes] = []

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The penalty now; none in the first task."""
        return self.strength * torch.stack([held.energy(model) for held in self.held]).sum() if self.held else None

    def end_task(self, model: Model, task: TaskData) -> None:
        """Choose the task's probes and find their modes. Cost: of `tangent_of` and `vulnerable_modes`."""
        inputs = balanced_probes(task, self.probes, self.seed)
        patterns = vulnerable_modes(tangent_of(model, inputs, task.seen), self.modes)
        with torch.no_grad():
            reference = _wide(comparable_logits(model, inputs)[:, list(task.seen)])
        later = reference.new_zeros(0, len(inputs))
        if self.later == "held":
            later = vulnerable_modes(tangent_of_later(model, inputs), -(-self.modes // len(task.seen)))[:, :, 0]
        parts = patterns.to(reference), reference, later.to(reference)
        self.held.append(HeldProbes(inputs, *parts, task.seen))

    def state_dict(self) -> State:
        """All that is held, task by task."""
        return {
            str(i): {
                "inputs": held.inputs,
                "patterns": held.patterns,
                "reference": held.reference,
                "later": held.later,
                "outputs": list(held.outputs),
            }
            for i, held in enumerate(self.held)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        parts = [state[str(i)] for i in range(len(state))]
        self.held = [HeldProbes(**{**part, "outputs": tuple(part["outputs"])}) for part in parts]


class SpectralDirections(Protection):
    r"""The data-free form: held are combinations of the parameters, and no sample is kept.

    The terms of all tasks, each with its own anchor, are one:

        sum_tau 1/k_tau || S_tau (theta - theta_tau) ||^2 = || R (theta - theta_last) + g ||^2

    R stacks the `S_tau / sqrt(k_tau)`; g is what each row was off its own anchor when the last task ended. It is exact
    for any number of tasks. Over `rank` rows, R and g are rotated to R's principal directions and the weakest rows go:
    the penalty then lacks `|| R_gone (theta - theta_last) + g_gone ||^2`, whose gradient is at most
    `2 s (s || theta - theta_last || + || g_gone ||)`, s the largest singular value that went.

    Args:
        strength: mu.
        modes: k; more than a task has outputs on its probes means all of them.
        probes: training samples of each task, balanced over labels, whose modes are taken.
        later: outputs that come later are "held", or "free".
        rank: rows of R kept over all tasks; None keeps k for each.
        seed: of the choice of probes.

    Attributes:
        root: R, by parameter, (rows, *shape of the parameter when the last task ended).
        gap: g (rows,).
        anchor: theta_last, by parameter.
        later_roots: of each task, what holds later rows [w b] of the head, (m, d + 1), and the outputs that are not
            later.

    Cost: 2 rows P at every step, whatever the batch; memory rows P.
    """

    def __init__(
        self,
        strength: float = 0.3,
        modes: int = 100,
        *,
        probes: int = 100,
        later: str = "held",
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        _require(strength, modes, probes, later)
        if rank is not None:
            require_integer("rank", rank, least=1)
        self.strength = strength
        self.modes = modes
        self.probes = probes
        self.later = later
        self.rank = rank
        self.seed = seed
        self.root: dict[str, Tensor] = {}
        self.gap = torch.zeros(0)
        self.anchor: dict[str, Tensor] = {}
        self.later_roots: list[tuple[Tensor, tuple[int, ...]]] = []

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The penalty now; none in the first task."""
        if not self.root:
            return None
        total = self._moved(model).square().sum()
        for root, outputs in self.later_roots:
            rows = stacked(model.head)
            total = total + (root.to(rows) @ rows[:, _others(outputs, rows.shape[1])]).square().sum()
        return self.strength * total

    def end_task(self, model: Model, task: TaskData) -> None:
        """Add the directions of the task that ends. Cost: of `tangent_of` and `vulnerable_modes`, and k products."""
        parameters = trainable(model)
        inputs = balanced_probes(task, self.probes, self.seed)
        tangent = tangent_of(model, inputs, task.seen)
        patterns = vulnerable_modes(tangent, self.modes)
        scale = len(patterns) ** -0.5
        columns = (scale * tangent.transpose(patterns)).split([values.numel() for values in parameters.values()], 1)
        self._add(model, dict(zip(parameters, columns, strict=True)), len(patterns))
        if self.later == "held":
            own = tangent_of_later(model, inputs)
            root = scale * own.transpose(vulnerable_modes(own, -(-self.modes // len(task.seen))))
            self.later_roots.append((root.to(self.gap), task.seen))

    def state_dict(self) -> State:
        """R, g, the anchor, and what holds later outputs."""
        later = {str(i): {"root": root, "outputs": list(seen)} for i, (root, seen) in enumerate(self.later_roots)}
        return {"root": dict(self.root), "gap": self.gap, "anchor": dict(self.anchor), "later": later}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.root, self.gap, self.anchor = dict(state["root"]), state["gap"], dict(state["anchor"])
        parts = [state["later"][str(i)] for i in range(len(state["later"]))]
        self.later_roots = [(part["root"], tuple(part["outputs"])) for part in parts]

    def _add(self, model: Model, new: Mapping[str, Float[Tensor, "k p"]], count: int) -> None:
        """Stack new rows under R, and take the anchor here."""
        with torch.no_grad():
            off = self._moved(model)
        named = {name: _wide(value) for name, value in model.named_parameters() if name in {**self.root, **new}}
        for name, value in named.items():
            nothing = value.new_zeros([0] * (value.ndim + 1))
            old = padded(self.root.get(name, nothing).to(value), (len(off), *value.shape))
            rows = new.get(name, value.new_zeros(count, value.numel()))
            self.root[name] = torch.cat([old, rows.to(value).view(-1, *value.shape)])
        self.gap = torch.cat([off, off.new_zeros(count)]).to(next(iter(named.values())))
        self.anchor = named
        if self.rank is not None and len(self.gap) > self.rank:
            gram = torch.stack([rows.double().flatten(1) @ rows.double().flatten(1).T for rows in self.root.values()])
            rotation = torch.linalg.eigh(gram.sum(0)).eigenvectors[:, -self.rank :].flip(1).T
            self.root = {name: torch.tensordot(rotation.to(rows), rows, 1) for name, rows in self.root.items()}
            self.gap = rotation.to(self.gap) @ self.gap

    def _moved(self, model: Model) -> Float[Tensor, " rows"]:
        """`R (theta - theta_last) + g`."""
        named = dict(model.named_parameters())
        gone = [name for name in self.root if name not in named]
        if gone:
            raise complaint(
                f"a model without the parameters {gone[:3]} that earlier tasks hold",
                "all of them, whether or not they train",
                "Keep the model's modules from task to task, or use the form with probes.",
            )
        total = self.gap.to(next(iter(named.values())).device)
        for name, rows in self.root.items():
            anchor = self.anchor[name].to(total.device)
            moved = leading(named[name], anchor.shape) - anchor
            total = total + rows.to(moved).flatten(1) @ moved.flatten()
        return total


def _others(outputs: Sequence[int], count: int) -> list[int]:
    """Of `count` outputs those that are not among these."""
    return sorted(set(range(count)) - set(outputs))


def _require(strength: float, modes: int, probes: int, later: str) -> None:
    require_number("strength", strength)
    require_integer("modes", modes, least=1)
    require_integer("probes", probes, least=1)
    require_choice("later", later, ("held", "free"))


def _wide(values: Tensor) -> Tensor:
    """A copy of its own, at least in float32."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True)
