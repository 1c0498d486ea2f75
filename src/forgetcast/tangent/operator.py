"""The tangent operator of a model without a matrix: linearised once, chunk of samples by chunk, applied often."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_choice, require_integer
from forgetcast.tangent.chosen import ChosenParameters
from forgetcast.tangent.jacobian import logits_of
from forgetcast.tangent.linearise import PLAIN, PRODUCTS, Linearisation
from forgetcast.tangent.planner import chunk_size
from forgetcast.tangent.products import Middle


class TangentOperator:
    r"""J of a model at its parameters as they are now; later training does not move it.

    The rectangular kernel between old and new samples is `old.forward(new.transpose(u))`. What a chunk contributes is
    computed in the type of the model and added in float64. The model runs in evaluation mode, and is given back in its
    own. Graphs are freed with the operator, or by `free`.

    Args:
        model: any module whose outputs for a sample do not depend on the other samples.
        inputs: a tensor, or tensors nested in mappings, tuples and lists, all with the sample as first axis; a mapping
            is unpacked as `model(**inputs)`, a tuple as `model(*inputs)`. Chunks go to the device of the parameters.
        parameters: by the names that the model gives them; their order is that of the columns of J.
        outputs: from what the model returns to (samples, c), sample by sample; by default the tensor itself, or its
            `logits`.
        strategy: how `J v` is computed (`forgetcast.tangent.linearise`); "auto" takes the first of "double_backward",
            "forward", "difference" that works and passes the adjoint test on one sample.
        chunk: samples that go through the model together, whose graph is in memory; by default what fits 256 MB.
        memory: bytes of graphs to keep; a chunk whose graph finds no room is linearised anew for each product.

    Attributes:
        samples: n.
        outputs: c.
        parameters: P.
        strategy: the strategy in use.
        refused: why "auto" passed over the strategies before it.
        sample_bytes: memory that the graph of one sample takes.

    Raises:
        ValueError: inputs, parameters or outputs that do not fit the model; a strategy that does not work on it.

    Cost of a product over all samples, in forward passes: `J^T u` 1 and `J v` 1 with kept graphs, 2 and 3 without;
    a block shares what is linearised anew.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        parameters: Mapping[str, Tensor],
        outputs: Callable[[Any], Tensor] | None = None,
        *,
        strategy: str = "auto",
        chunk: int | None = None,
        memory: float = 2.0**30,
    ) -> None:
        require_choice("strategy", strategy, ("auto", *PRODUCTS))
        if chunk is not None:
            require_integer("chunk", chunk, least=1)
        self._function = ChosenParameters(model, inputs, parameters, logits_of if outputs is None else outputs)
        self._point = [values.detach().clone() for values in parameters.values()]
        self._sizes = [values.numel() for values in self._point]
        self._memory = memory
        self.samples = self._function.samples
        self.parameters = sum(self._sizes)
        self._graphs: dict[int, Linearisation] = {}
        self._values: dict[int, Tensor] = {}
        self._counted = dict.fromkeys(("forward", "transpose"), 0)
        self.refused: dict[str, str] = {}
        trial = self._choose(strategy)
        self.outputs = trial.value.shape[1]
        self.sample_bytes = trial.memory
        self._starts = range(0, self.samples, chunk or chunk_size(trial.memory, self.samples))

    @property
    def passes(self) -> dict[str, float]:
        """Passes over all samples so far: runs of the model, products `J v`, products `J^T u`."""
        return {kind: n / self.samples for kind, n in {"model": self._function.evaluated, **self._counted}.items()}

    @property
    def kept(self) -> int:
        """Bytes of the graphs that are kept now."""
        return sum(graph.memory for graph in self._graphs.values())

    def free(self) -> None:
        """Forget all graphs; the next product linearises anew."""
        self._graphs.clear()

    def value(self) -> Float[Tensor, "n c"]:
        """The outputs at the parameters where J is taken."""
        missing = [start for start in self._starts if start not in self._values]
        for start in missing:
            with torch.no_grad():
                self._values[start] = self._function(self._rows(start), self._point)
        return torch.cat([self._values[start] for start in self._starts])

    def forward(self, v: Float[Tensor, "*k P"]) -> Float[Tensor, "*k n c"]:
        """`J v`."""
        directions = v.reshape(-1, self.parameters)
        product = v.new_empty(len(directions), self.samples, self.outputs)
        for rows, graph in self._chunks():
            for place, direction in enumerate(directions):
                product[place, rows] = self._push(graph, direction).to(v)
        return product.reshape(*v.shape[:-1], self.samples, self.outputs)

    def transpose(self, u: Float[Tensor, "*k n c"]) -> Float[Tensor, "*k P"]:
        """`J^T u`."""
        cotangents = u.reshape(-1, self.samples, self.outputs)
        total = u.new_zeros(len(cotangents), self.parameters, dtype=torch.float64)
        for rows, graph in self._chunks():
            for place, cotangent in enumerate(cotangents):
                self._pull(graph, cotangent[rows], total[place])
        return total.to(u).reshape(*u.shape[:-2], self.parameters)

    def kernel(self, u: Float[Tensor, "*k n c"]) -> Float[Tensor, "*k n c"]:
        """`J J^T u`."""
        return self.forward(self.transpose(u))

    def between(self, v: Float[Tensor, "*k P"], middle: Middle) -> Float[Tensor, "*k P"]:
        """`J^T middle(outputs, J v)` in one sweep, for a `middle` that acts on every sample alone."""
        directions = v.reshape(-1, self.parameters)
        total = torch.zeros_like(directions, dtype=torch.float64)
        for _, graph in self._chunks():
            for place, direction in enumerate(directions):
                self._pull(graph, middle(graph.value, self._push(graph, direction)), total[place])
        return total.to(v).reshape(v.shape)

    def adjoint_gap(self, draws: int = 4, seed: int = 0) -> float:
        """Relative difference of `<w, J v>` and `<J^T w, v>` over random v and w: 0 up to rounding for a right J v."""
        return _adjoint_gap(self.forward, self.transpose, self._sketch((self.samples, self.outputs), draws, seed))

    def _rows(self, start: int) -> slice:
        return slice(start, min(start + self._starts.step, self.samples))

    def _chunks(self) -> Iterator[tuple[slice, Linearisation]]:
        for start in self._starts:
            rows = self._rows(start)
            graph = self._graphs.pop(start, None) or self._linearised(rows, self.strategy)
            self._values[start] = graph.value
            yield rows, graph
            if self.kept + graph.memory <= self._memory:
                self._graphs[start] = graph

    def _linearised(self, rows: slice, strategy: str) -> Linearisation:
        function = partial(self._function, rows)
        return Linearisation(function, self._point, plain=PLAIN[strategy], standing=self._function.standing())

    def _push(self, graph: Linearisation, direction: Float[Tensor, " P"]) -> Tensor:
        self._counted["forward"] += len(graph.value)
        parts = torch.split(direction, self._sizes)
        shaped = [part.view(values.shape).to(values) for part, values in zip(parts, graph.point, strict=True)]
        return PRODUCTS[self.strategy](graph, shaped)

    def _pull(self, graph: Linearisation, cotangent: Float[Tensor, "b c"], total: Float[Tensor, " P"]) -> None:
        self._counted["transpose"] += len(graph.value)
        for part, place in zip(graph.transpose(cotangent), torch.split(total, self._sizes), strict=True):
            place += part.reshape(-1)

    def _choose(self, strategy: str) -> Linearisation:
        sample, limit = self._first_that_moves()
        for name in PRODUCTS if strategy == "auto" else (strategy,):
            self.strategy = name
            try:
                graph = self._linearised(sample, name)
                gap = self._gap_of(graph)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                self.refused[name] = str(error).strip().splitlines()[0]
                continue
            if gap <= limit:
                return graph
            self.refused[name] = f"the adjoint test is off by {gap:.1g}, above {limit:.1g}"
        raise complaint(
            f"no way to compute J v: {self.refused}",
            "a model that can be differentiated twice, or whose central differences converge",
            "Give the model in float64, without custom fused operations.",
        )

    def _first_that_moves(self) -> tuple[slice, float]:
        """A sample whose outputs depend on the parameters, and how well `J v` and `J^T u` must agree on it.

        An error of the model's own surfaces here.
        """
        for place in range(self.samples):
            sample = slice(place, place + 1)
            graph = Linearisation(partial(self._function, sample), self._point, plain=False)
            if graph.differentiable:
                return sample, max(torch.finfo(values.dtype).eps for values in (*self._point, graph.value)) ** (1 / 3)
        raise complaint(
            "outputs that depend on none of the parameters",
            "outputs with a gradient",
            "Look for torch.no_grad or detach inside the model, or give other parameters.",
        )

    def _gap_of(self, graph: Linearisation) -> float:
        def pull(cotangent: Tensor) -> Tensor:
            total = cotangent.new_zeros(self.parameters)
            self._pull(graph, cotangent, total)
            return total

        return _adjoint_gap(lambda v: self._push(graph, v), pull, self._sketch(graph.value.shape, 2, 0))

    def _sketch(self, shape: Sequence[int], draws: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        device = self._point[0].device
        sizes = (self.parameters,), tuple(shape)
        pairs = [[torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes] for _ in range(draws)]
        return [(v.to(device), w.to(device)) for v, w in pairs]


def _adjoint_gap(
    push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]]
) -> float:
    pushed = torch.stack([(w * push(v)).sum() for v, w in pairs])
    pulled = torch.stack([(pull(w) * v).sum() for v, w in pairs])
    size = float(torch.maximum(pushed.norm(), pulled.norm()))
    return float((pushed - pulled).norm()) / size if size > 0 else 0.0
