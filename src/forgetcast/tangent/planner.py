r"""Which form each layer's part of a tangent kernel takes, and what the whole costs: pure arithmetic, nothing is run.

    explicit   build the gradients (n, c, p), multiply them            c^2 p            multiply-adds a pair of samples
    gram       sum_ts (x_it . x_js) (g_ict . g_jds), nothing built     T^2 (c^2 outputs + inputs + c^2 h)

with h what adding up one pair of tokens costs, in multiply-adds. So "gram" if `T^2 (outputs + inputs / c^2 + h) < p`:
heads, perceptrons (T = 1, where nothing is added up) and embeddings; low-rank factors on many tokens are explicit.
Where only equal outputs meet (trace kernels), c takes the place of c^2 and h counts once.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from forgetcast.checks import complaint

BUDGET = 2**28
"""Bytes that a chunk of samples may keep for its backward passes."""

TOKEN_PAIR = 50.0
"""h, fitted to times of both forms at 1 to 197 tokens; where it puts the change of form, each costs about the same."""


@dataclass(frozen=True)
class LayerSize:
    """What one parameter's part of a kernel depends on.

    Attributes:
        parameters: p.
        tokens: T, over all uses of the parameter in one sample.
        inputs: width of what meets in Gram form; None where there is no such form.
        outputs: channels of the gradient.
        layer: parameters of the same layer share this number, and the products of the gradients at its output.
    """

    parameters: int
    tokens: int
    inputs: int | None
    outputs: int
    layer: int


@dataclass(frozen=True)
class LayerPlan:
    """How one parameter's part is computed.

    Attributes:
        parameters: p.
        form: "gram", "explicit", or "general" for a parameter without a rule, whose gradients come explicitly.
        keeps: what is kept of each sample: "factors" (x and g) or "rows" (its gradients).
        operations: multiply-adds of the kernel blocks, passes through the model apart.
        bytes: kept in all.
    """

    parameters: int
    form: str
    keeps: str
    operations: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """What a tangent kernel costs.

    Attributes:
        layers: by parameter; parameters that the outputs do not depend on are left out.
        samples: of the sets whose blocks are computed.
        outputs: numbers a sample that are differentiated.
        chunk: samples that go through the model together.
        forwards: passes forward, of every sample.
        backwards: passes backward, of every sample.
        operations: multiply-adds of the kernel blocks.
        bytes: largest memory of what is kept and of the blocks.
    """

    layers: dict[str, LayerPlan]
    samples: tuple[int, ...]
    outputs: int
    chunk: int
    forwards: int
    backwards: int
    operations: float
    bytes: float


def chunk_size(sample_bytes: int, samples: int, budget: int = BUDGET) -> int:
    """Samples a chunk: as many as fit the budget, at least one, and about equal over the chunks."""
    most = max(1, min(samples, budget // max(sample_bytes, 1)))
    chunks = -(-samples // most)
    return -(-samples // chunks)


def pair_costs(size: LayerSize, outputs: int, *, trace: bool, token_pair: float = TOKEN_PAIR) -> tuple[float, float]:
    """Multiply-adds a pair of samples: (explicit, gram); the second is infinite where there is no such form."""
    meetings = outputs if trace else outputs**2
    explicit = float(meetings * size.parameters)
    if size.inputs is None:
        return explicit, float("inf")
    adding = 0.0 if size.tokens == 1 else token_pair * (1 if trace else meetings)
    return explicit, size.tokens**2 * (meetings * size.outputs + size.inputs + adding)


def plan(
    sizes: Mapping[str, LayerSize],
    general: Mapping[str, int],
    *,
    samples: Sequence[int],
    outputs: int,
    chunk: int,
    looped: Collection[str] = (),
    trace: bool = False,
    token_pair: float = TOKEN_PAIR,
    itemsize: int = 4,
) -> Plan:
    """The cheaper form of every layer.

    Args:
        sizes: of the parameters that rules cover.
        general: number of entries of each parameter without a rule.
        samples: one set, or two whose three blocks are wanted.
        outputs: c.
        chunk: samples that go through the model together.
        looped: those of `general` that take a loop over samples; the others share one pass under `vmap`.
        trace: whether only equal outputs meet.
        token_pair: h.
        itemsize: bytes of a number in the model.
    """
    total = sum(samples)
    pairs = sum(a * b for place, a in enumerate(samples) for b in samples[place:])
    layers = {}
    weights = {
        size.layer for size in sizes.values() if size.inputs and _is_gram(size, outputs, trace=trace, h=token_pair)
    }
    for name, size in sizes.items():
        explicit, gram = pair_costs(size, outputs, trace=trace, token_pair=token_pair)
        shares = size.inputs == 0 and size.layer in weights  # a bias adds 1 to the products of its weight's inputs
        factors = size.tokens * (size.inputs or size.outputs) + outputs * size.tokens * size.outputs
        as_gram = shares or gram < explicit
        keeps = "factors" if as_gram or factors < outputs * size.parameters else "rows"
        kept = (factors if keeps == "factors" else outputs * size.parameters) * total * itemsize
        operations = 0.0 if shares else min(gram, explicit) * pairs
        form = "gram" if as_gram else "explicit"
        layers[name] = LayerPlan(size.parameters, form, keeps, operations, 0.0 if shares else float(kept))
    for name, parameters in general.items():
        meetings = outputs if trace else outputs**2
        kept = outputs * parameters * total * itemsize
        layers[name] = LayerPlan(parameters, "general", "rows", float(meetings * parameters * pairs), float(kept))
    blocks = 8 * pairs * (1 if trace else outputs**2)
    passes = 1 + bool(looped) + bool(general.keys() - set(looped))
    return Plan(
        layers,
        tuple(samples),
        outputs,
        chunk,
        forwards=passes,
        backwards=passes * outputs,
        operations=sum(layer.operations for layer in layers.values()),
        bytes=sum(layer.bytes for layer in layers.values()) + blocks,
    )


def require_memory(plan: Plan, memory: float) -> None:
    """Raise if the plan keeps more than `memory` bytes."""
    if plan.bytes > memory:
        largest = max(plan.layers, key=lambda name: plan.layers[name].bytes)
        raise complaint(
            f"a kernel of {plan.samples} samples with {plan.outputs} outputs keeps {plan.bytes / 1e9:.3g} GB "
            f"(most for {largest!r})",
            f"at most memory={memory / 1e9:.3g} GB",
            "Take fewer samples or parameters, the trace kernel with a few probes, or raise `memory`.",
        )


def _is_gram(size: LayerSize, outputs: int, *, trace: bool, h: float) -> bool:
    explicit, gram = pair_costs(size, outputs, trace=trace, token_pair=h)
    return gram < explicit
