r"""How much of a model to train on a new task: the linear model with a shared and a task-specific part.

    y_k = X_k^T u_k + Z_k^T q_k + noise        u: p numbers, kept by "frozen" training; q: p_2, trained by both

Features are isotropic Gaussian, the loss is squared, task 2 has n samples and starts from what task 1 left. "Frozen"
trains q alone, "initialized" u and q, each to the solution nearest to the start (more numbers than samples) or to least
squares (fewer). Errors of a task are |u_k - u|^2 + |q_k - q|^2, without the noise that no training removes.

    e_u = |u_1 - u|^2, e_q = |q_1 - q|^2       what task 1 left of itself
    d_u = |u_2 - u|^2, d_q = |q_2 - q|^2       how far its end is from task 2
    D_u = |u_1 - u_2|^2, D_q = |q_1 - q_2|^2   how far the tasks are from each other

"Magnitude" is the number of trained parameters, as in arXiv 2602.20796, which publishes no formulas: these were derived
for its model and hold against simulation (benchmarks/magnitude_simulation.py). How long a step is along a given
direction is another question: `forecast/step_length.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from typing import Literal

from forgetcast.checks import complaint, require_integer, require_number

Regime = Literal["over-parameterised", "under-parameterised"]


@dataclass(frozen=True)
class Transition:
    """Task 2 on a model that has learnt task 1.

    Attributes:
        shared: p.
        specific: p_2, at least 1.
        samples: n, of task 2.
        noise: sigma, standard deviation of the label noise.
        shared_error: e_u.
        specific_error: e_q.
        shared_change: D_u.
        specific_change: D_q.
        shared_distance: d_u.
        specific_distance: d_q.
    """

    shared: int
    specific: int
    samples: int
    noise: float
    shared_error: float
    specific_error: float
    shared_change: float
    specific_change: float
    shared_distance: float
    specific_distance: float

    def __post_init__(self) -> None:
        require_integer("shared", self.shared, least=0)
        require_integer("specific", self.specific, least=1)
        require_integer("samples", self.samples, least=1)
        for name in ("noise", *(f"{part}_{what}" for part in PARTS for what in ("error", "change", "distance"))):
            require_number(name, getattr(self, name))
        _require_shared(self, "error", "change", "distance")

    @property
    def parameters(self) -> int:
        """P = p + p_2."""
        return self.shared + self.specific


PARTS = ("shared", "specific")


@dataclass(frozen=True)
class Outcome:
    """What a training is expected to do.

    Attributes:
        forgetting: error of task 1 after minus before; negative where it improves.
        error: of task 2 afterwards.
        trained: numbers trained.
        regime: whether these are more than the samples, or fewer.
    """

    forgetting: float
    error: float
    trained: int
    regime: Regime

    @property
    def mean(self) -> float:
        """Half of forgetting and error together."""
        return (self.forgetting + self.error) / 2


def frozen(task: Transition) -> Outcome:
    r"""Train the task-specific part alone; the error of the shared part acts as further label noise.

        s^2 = d_u + sigma^2,  rho = n / p_2
        over:   F = rho (D_q - e_q) + n s^2 / (p_2 - n - 1)     G = d_u + (1 - rho) d_q + n s^2 / (p_2 - n - 1)
        under:  F = D_q - e_q + p_2 s^2 / (n - p_2 - 1)         G = d_u + p_2 s^2 / (n - p_2 - 1)

    Raises:
        ValueError: p_2 within 1 of n, where the expected error is infinite.
    """
    kept, spread, regime = _fit(task.specific, task.samples)
    noise = spread * (task.shared_distance + task.noise**2)
    forgetting = (1 - kept) * (task.specific_change - task.specific_error) + noise
    error = task.shared_distance + kept * task.specific_distance + noise
    return Outcome(forgetting, error, task.specific, regime)


def initialized(task: Transition) -> Outcome:
    r"""Train everything, from where task 1 ended.

        over:   F = (n/P) (D_u + D_q - e_u - e_q) + n sigma^2 / (P - n - 1)   G = (1 - n/P) (d_u + d_q) + the same noise
        under:  F = D_u + D_q - e_u - e_q + P sigma^2 / (n - P - 1)           G = P sigma^2 / (n - P - 1)

    Raises:
        ValueError: P within 1 of n, where the expected error is infinite.
    """
    kept, spread, regime = _fit(task.parameters, task.samples)
    noise = spread * task.noise**2
    change, error = task.shared_change + task.specific_change, task.shared_error + task.specific_error
    forgetting = (1 - kept) * (change - error) + noise
    return Outcome(forgetting, kept * (task.shared_distance + task.specific_distance) + noise, task.parameters, regime)


@dataclass(frozen=True)
class FirstTask:
    """Task 1, learnt by all parameters from zero, and how task 2 differs.

    Attributes:
        shared: p.
        specific: p_2.
        samples: n_1.
        noise: sigma.
        shared_size: |u_1|^2.
        specific_size: |q_1|^2.
        shared_change: D_u.
        specific_change: D_q.
        shared_turn: <u_2 - u_1, u_1>.
        specific_turn: <q_2 - q_1, q_1>.
    """

    shared: int
    specific: int
    samples: int
    noise: float
    shared_size: float
    specific_size: float
    shared_change: float
    specific_change: float
    shared_turn: float = 0.0
    specific_turn: float = 0.0

    def __post_init__(self) -> None:
        require_integer("shared", self.shared, least=0)
        require_integer("specific", self.specific, least=1)
        require_integer("samples", self.samples, least=1)
        for name in ("noise", *(f"{part}_{what}" for part in PARTS for what in ("size", "change"))):
            require_number(name, getattr(self, name))
        _require_shared(self, "size", "change")
        for part in PARTS:
            turn, size, change = (getattr(self, f"{part}_{what}") for what in ("turn", "size", "change"))
            require_number(f"{part}_turn", turn, least=-float("inf"))
            if turn**2 > size * change * (1 + 1e-9):
                raise complaint(
                    f"got {part}_turn={turn!r} with {part}_size={size!r} and {part}_change={change!r}",
                    "an inner product of at most the product of the norms, the roots of the other two",
                    f"Correct {part}_turn; size and change are squared norms.",
                )

    def then(self, samples: int) -> Transition:
        r"""The expected transition to a task 2 of n samples.

            over:   e_u = (a + b) |u_1|^2 + b p |theta_1|^2 + (p/P) n_1 sigma^2 / (P - n_1 - 1)
                    m = P - n_1,  b = m (P - m) / (P (P - 1) (P + 2)),  a = (m^2 - 2 b P) / P^2
                    d_u = D_u + e_u + 2 (1 - n_1/P) <u_2 - u_1, u_1>
            under:  e_u = p sigma^2 / (n_1 - P - 1),  d_u = D_u + e_u

        and the same for q with p_2.

        Raises:
            ValueError: P within 1 of n_1.
        """
        P = self.shared + self.specific
        kept, spread, _ = _fit(P, self.samples)
        m = kept * P
        b = m * (P - m) / (P * (P - 1) * (P + 2)) if P > 1 else 0.0
        a = (m**2 - 2 * b * P) / P**2
        whole = self.shared_size + self.specific_size
        noise = spread * self.noise**2 / P

        def part(size: float, count: int, change: float, turn: float) -> tuple[float, float]:
            error = (a + b) * size + count * (b * whole + noise)
            return error, max(change + error + 2 * kept * turn, 0.0)

        shared = part(self.shared_size, self.shared, self.shared_change, self.shared_turn)
        specific = part(self.specific_size, self.specific, self.specific_change, self.specific_turn)
        return Transition(
            self.shared,
            self.specific,
            samples,
            self.noise,
            shared_error=shared[0],
            specific_error=specific[0],
            shared_change=self.shared_change,
            specific_change=self.specific_change,
            shared_distance=shared[1],
            specific_distance=specific[1],
        )


@dataclass(frozen=True)
class Optimum:
    """The number of trained parameters with the least forgetting.

    Attributes:
        specific: p_2*, a real number; None where forgetting falls for ever, towards 0 from above.
        forgetting: F*, at it; 0 where there is none.
        plateau: the interval of p_2 where forgetting is within a tenth of F*; None where there is none.
    """

    specific: float | None
    forgetting: float
    plateau: tuple[float, float] | None


def optimal_specific(samples: int, gain: float, loss: float) -> Optimum:
    r"""How large the task-specific part is best made, for frozen training with more parameters than samples.

        F(p_2) = -n xi / p_2 + n eta / (p_2 - n - 1)
        xi = e_q - D_q,  eta = d_u + sigma^2
        p_2* = (n + 1) sqrt(xi) / (sqrt(xi) - sqrt(eta)),  F* = -n / (n + 1) (sqrt(xi) - sqrt(eta))^2  iff xi > eta > 0

    The condition is that of Theorem IV.4 of arXiv 2602.20796, whose own xi and eta are not published. With eta = 0 the
    optimum is at the edge, p_2 = n + 1.

    Args:
        samples: n.
        gain: xi, by how much task 1's part was further from task 1 than task 2's is; of either sign.
        loss: eta, the frozen shared part's error on task 2 with the noise.
    """
    require_integer("samples", samples, least=1)
    require_number("gain", gain, least=-float("inf"))
    require_number("loss", loss)
    if gain <= loss or gain <= 0:
        return Optimum(None, 0.0, None)
    root, other = sqrt(gain), sqrt(loss)
    least = -samples / (samples + 1) * (root - other) ** 2
    # F(p) = level is a quadratic in p: level p (p - n - 1) + n xi (p - n - 1) - n eta p = 0
    level, edge = 0.9 * least, samples + 1
    half = -(samples * (gain - loss) - level * edge) / (2 * level)
    width = sqrt(max(half**2 + samples * gain * edge / level, 0.0))
    return Optimum(edge * root / (root - other), least, (half - width, half + width))


def crossing(task: Transition) -> float:
    r"""The distance D_u of the shared parts at which frozen and initialized training are equally good.

        D* = (V - e_u) / kappa - e_u - sigma^2,   kappa = p_2 / (n - p_2 - 1),   V = P sigma^2 / (n - P - 1)

    Below it frozen training has the lower sum of forgetting and error, given d_u = D_u + e_u. Negative: frozen training
    is never better, because task 1's shared part was learnt too badly to be kept.

    Raises:
        ValueError: not more samples than parameters; no shared part.
    """
    kappa, v = _under(task)
    return (v - task.shared_error) / kappa - task.shared_error - task.noise**2


def crossing_of_forgetting(task: Transition) -> tuple[float, float] | None:
    r"""The distances D_u for which frozen training forgets less, whatever the error on task 2.

        D_u (1 - kappa) > kappa (e_u + sigma^2) + e_u - V       (kappa and V as in `crossing`)

    Returns:
        From where to where; None if nowhere. With p_2 < (n - 1) / 2 there is no upper end.

    Raises:
        ValueError: as `crossing`.
    """
    kappa, v = _under(task)
    right = kappa * (task.shared_error + task.noise**2) + task.shared_error - v
    if kappa < 1:
        return max(right / (1 - kappa), 0.0), float("inf")
    if right >= 0:
        return None
    return 0.0, float("inf") if kappa == 1 else right / (1 - kappa)


def crossing_cosine(distance: float, size: float) -> float:
    """The cosine of two tasks' gradients at a common point that belongs to a distance: 1 - D / (2 |theta|^2).

    For nearly isotropic curvature and tasks of one norm, seen from the point where all parameters are zero.

    Args:
        distance: D, squared.
        size: squared norm of either task, seen from the common point.
    """
    require_number("distance", distance, least=-float("inf"))
    require_number("size", size, strict=True)
    return 1 - distance / (2 * size)


@dataclass(frozen=True)
class Errors:
    """Errors of a sequence of tasks.

    Attributes:
        errors: errors[t][k], of task k after task t was learnt; the first row is the start.
        forgetting: mean over the tasks but the last of the error at the end minus just after the task was learnt.
    """

    errors: tuple[tuple[float, ...], ...]
    forgetting: float


def sequence(
    trained: int,
    samples: int,
    noises: Sequence[float],
    changes: Sequence[Sequence[float]],
    start: Sequence[float],
) -> Errors:
    r"""Errors of T tasks that train the same parameters one after the other.

        over:   e_k <- (1 - rho) e_k + rho |theta_k - theta_t|^2 + n s_t^2 / (p - n - 1),   rho = n / p
        under:  e_k <- |theta_k - theta_t|^2 + p s_t^2 / (n - p - 1)

    for every task k when task t is learnt. For frozen training p = p_2, theta = q, s_t^2 = |u_t - u|^2 + sigma^2; for
    initialized training p = P and s_t^2 = sigma^2.

    Args:
        trained: p.
        samples: n, of each task.
        noises: s_t^2, task by task.
        changes: |theta_k - theta_t|^2, (T, T).
        start: e_k before the first task.

    Raises:
        ValueError: fewer than two tasks; numbers of tasks that differ; a number below zero; p within 1 of n.

    Cost: T^2.
    """
    require_integer("trained", trained, least=1)
    require_integer("samples", samples, least=1)
    T = len(noises)
    if T < 2 or len(start) != T or len(changes) != T or any(len(row) != T for row in changes):
        raise complaint(
            f"{T} noises, {len(start)} starts, changes of {[len(row) for row in changes]}",
            "as many of each as tasks, at least two",
            "Give one of each for every task.",
        )
    for name, values in {"noises": noises, "start": start, "changes": chain.from_iterable(changes)}.items():
        for value in values:
            require_number(f"a number of {name}", value)
    kept, spread, _ = _fit(trained, samples)
    rows = [tuple(float(value) for value in start)]
    for t in range(T):
        rows.append(tuple(kept * rows[-1][k] + (1 - kept) * changes[k][t] + spread * noises[t] for k in range(T)))
    forgetting = sum(rows[-1][k] - rows[k + 1][k] for k in range(T - 1)) / (T - 1)
    return Errors(tuple(rows), forgetting)


def _require_shared(task: Transition | FirstTask, *what: str) -> None:
    given = {f"shared_{name}": getattr(task, f"shared_{name}") for name in what}
    if task.shared == 0 and any(given.values()):
        raise complaint(
            f"no shared parameter, but {', '.join(f'{name}={value!r}' for name, value in given.items())}",
            "zeros where shared=0",
            "Give the number of shared parameters, or zeros.",
        )


def _fit(trained: int, samples: int) -> tuple[float, float, Regime]:
    """Share of the start that stays, variance for each unit of label noise, regime."""
    if trained > samples + 1:
        return 1 - samples / trained, samples / (trained - samples - 1), "over-parameterised"
    if trained < samples - 1:
        return 0.0, trained / (samples - trained - 1), "under-parameterised"
    raise complaint(
        f"{trained} trained parameters for {samples} samples",
        f"more than {samples + 1} or fewer than {samples - 1}: in between the expected error is infinite",
        "Train more parameters or fewer, or take other samples.",
    )


def _under(task: Transition) -> tuple[float, float]:
    if task.parameters >= task.samples - 1 or task.shared == 0:
        raise complaint(
            f"a crossing distance for p={task.shared}, p_2={task.specific}, n={task.samples}",
            "a shared part, and more samples than p + p_2 + 1",
            "Compare frozen(...) and initialized(...) directly.",
        )
    kappa = task.specific / (task.samples - task.specific - 1)
    return kappa, task.parameters * task.noise**2 / (task.samples - task.parameters - 1)
