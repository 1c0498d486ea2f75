r"""The spectral regulariser of a network: old outputs are held still along their vulnerable modes, and only there.

    probes      (mu / k) sum_tau sum_{j<=k} ( u_j^T [f_tau(theta) - f_tau^ref] )^2
    data-free   (mu / k) sum_tau || S_tau (theta - theta_tau) ||^2,      S_tau = U_k^T J_tau = Sigma_k V_k^T

u_j are the leading eigenvectors of the tangent kernel of all that trains, over probes and outputs seen, taken when task
tau ends; they stay. The data-free form is the first to first order in the displacement, and the same where outputs are
linear in what trains. Outputs that come later do not enter. Source: arXiv 2606.18024.

Along mode j either form adds a curvature of `2 mu l_j / k`, l_j growing with the number of probes: plain gradient
descent is stable below a rate of `k / (mu l_1)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from forgetcast.checks import complaint, require_integer, require_number
from forgetcast.methods.base import Batch, Model, Protection, State, TaskData
from forgetcast.protect.parameters import leading, padded
from forgetcast.protect.vulnerable import balanced_probes, outputs_of, tangent_of, vulnerable_modes
from forgetcast.tangent.jacobian import trainable


@dataclass(frozen=True, eq=False)
class HeldProbes:
    """What a finished task leaves behind.

    Attributes:
        inputs: (n, ...) the probes.
        patterns: u_j (k, n, c), orthonormal.
        reference: f_ref (n, c).
        outputs: the c outputs seen when the task ended.
    """

    inputs: Float[Tensor, "n *shape"]
    patterns: Float[Tensor, "k n c"]
    reference: Float[Tensor, "n c"]
    outputs: tuple[int, ...]

    def energy(self, model: Model) -> Float[Tensor, ""]:
        """`1/k sum_j (u_j^T [f - f_ref])^2` now. Cost: a pass of the probes, in evaluation mode, and 2 k n c."""
        inputs = self.inputs.to(next(model.parameters()).device)
        now = outputs_of(model, inputs, self.outputs)
        gap = now.to(self.reference.dtype) - self.reference.to(now.device)
        return (self.patterns.to(now.device).flatten(1) @ gap.flatten()).square().mean()


class SpectralProbes(Protection):
    """The form with probes, exact for any network.

    Args:
        strength: mu.
        modes: k; more than a task has outputs on its probes means all of them, which is distillation of all outputs.
        probes: training samples kept of each task, balanced over labels.
        seed: of their choice.

    Attributes:
        held: what each finished task left behind.

    Cost: every step, a pass forwards and backwards of all probes of all finished tasks: each u_j mixes all probes of
    its task, so that there is no minibatch of them. Memory for each task: its probes and k n c numbers.
    """

    def __init__(self, strength: float = 1.0, modes: int = 10, *, probes: int = 100, seed: int = 0) -> None:
        _require(strength, modes, probes)
        self.strength = strength
        self.modes = modes
        self.probes = probes
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
            reference = _wide(outputs_of(model, inputs, task.seen))
        self.held.append(HeldProbes(inputs, patterns.to(reference), reference, task.seen))

    def state_dict(self) -> State:
        """All that is held, task by task."""
        return {
            str(i): {
                "inputs": held.inputs,
                "patterns": held.patterns,
                "reference": held.reference,
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

    R stacks the `S_tau / sqrt(k_tau)`, and g is what each row was off its own anchor when the last task ended. That is
    exact for any number of tasks. Over `rank` rows, R and g are rotated to R's principal directions and the weakest
    rows go: the penalty then lacks `|| R_gone (theta - theta_last) + g_gone ||^2`, whose gradient is at most
    `2 s (s || theta - theta_last || + || g_gone ||)`, s the largest singular value that went.

    Args:
        strength: mu.
        modes: k; more than a task has outputs on its probes means all of them.
        probes: training samples of each task, balanced over labels, whose modes are taken.
        rank: rows kept over all tasks; None keeps k for each.
        seed: of the choice of probes.

    Attributes:
        root: R, by parameter, (rows, *shape of the parameter when the last task ended).
        gap: g (rows,).
        anchor: theta_last, by parameter.

    Cost: 2 rows P every step, whatever the batch; memory rows P.
    """

    def __init__(
        self, strength: float = 1.0, modes: int = 10, *, probes: int = 100, rank: int | None = None, seed: int = 0
    ) -> None:
        _require(strength, modes, probes)
        if rank is not None:
            require_integer("rank", rank, least=1)
        self.strength = strength
        self.modes = modes
        self.probes = probes
        self.rank = rank
        self.seed = seed
        self.root: dict[str, Tensor] = {}
        self.gap = torch.zeros(0)
        self.anchor: dict[str, Tensor] = {}

    def loss(self, model: Model, batch: Batch, logits: Float[Tensor, "n C"]) -> Tensor | None:  # noqa: ARG002
        """The penalty now; none in the first task."""
        return self.strength * self._moved(model).square().sum() if self.root else None

    def end_task(self, model: Model, task: TaskData) -> None:
        """Add the directions of the task that ends. Cost: of `tangent_of` and `vulnerable_modes`, and k products."""
        parameters = trainable(model)
        tangent = tangent_of(model, balanced_probes(task, self.probes, self.seed), task.seen)
        patterns = vulnerable_modes(tangent, self.modes)
        S = tangent.transpose(patterns) / len(patterns) ** 0.5
        columns = S.split([parameter.numel() for parameter in parameters.values()], 1)
        new = {name: rows.view(-1, *parameters[name].shape) for name, rows in zip(parameters, columns, strict=True)}
        with torch.no_grad():
            off = self._moved(model)
        values = {name: _wide(value) for name, value in model.named_parameters() if name in {**self.root, **new}}
        for name, value in values.items():
            nothing = value.new_zeros([0] * (value.ndim + 1))
            parts = (self.root.get(name, nothing), len(off)), (new.get(name, nothing), len(S))
            self.root[name] = torch.cat([padded(rows.to(value), (count, *value.shape)) for rows, count in parts])
        self.gap = torch.cat([off, off.new_zeros(len(S))])
        self.anchor = values
        if self.rank is not None and len(self.gap) > self.rank:
            self._truncate(self.rank)

    def state_dict(self) -> State:
        """R, g and the anchor."""
        return {"root": dict(self.root), "gap": self.gap, "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.root, self.gap, self.anchor = dict(state["root"]), state["gap"], dict(state["anchor"])

    def _moved(self, model: Model) -> Float[Tensor, " rows"]:
        """`R (theta - theta_last) + g`."""
        named = dict(model.named_parameters())
        gone = [name for name in self.root if name not in named]
        if gone:
            raise complaint(
                f"a model without the parameters {gone[:3]} that earlier tasks hold",
                "all of them, trainable or not",
                "Keep the model's modules from task to task, or use the form with probes.",
            )
        total = self.gap
        for name, rows in self.root.items():
            anchor = self.anchor[name]
            moved = leading(named[name], anchor.shape) - anchor.to(named[name].device)
            total = total.to(moved.device) + rows.to(moved.device).flatten(1) @ moved.flatten()
        return total

    def _truncate(self, rank: int) -> None:
        gram = sum(rows.double().flatten(1) @ rows.double().flatten(1).T for rows in self.root.values())
        rotation = torch.linalg.eigh(torch.as_tensor(gram)).eigenvectors[:, -rank:].flip(1).T
        self.root = {name: torch.tensordot(rotation.to(rows), rows, 1) for name, rows in self.root.items()}
        self.gap = rotation.to(self.gap) @ self.gap


def _require(strength: float, modes: int, probes: int) -> None:
    require_number("strength", strength)
    require_integer("modes", modes, least=1)
    require_integer("probes", probes, least=1)


def _wide(values: Tensor) -> Tensor:
    """A copy of its own, at least in float32."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True)
