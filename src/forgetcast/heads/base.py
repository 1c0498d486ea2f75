"""What every head is: features in, logits out, rows that grow by class; and what a head learnt from sums shares."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from forgetcast.checks import complaint, require_finite, require_integer

UNSEEN = -1e30
"""Logit of an output without one sample: finite, so that losses and softmax stay so, and never the largest."""


class Head(nn.Module, ABC):
    """Maps features (n, d) to logits (n, outputs), and grows.

    A head lists in `by_output` its parameters and buffers whose first axis is the output. Growing keeps their old rows
    and loading takes over the number of rows in the state, so a state fits a head of any number of outputs. A parameter
    that changes its rows is a new object: make the optimiser after the growth.

    Args:
        width: d, features a sample.

    Attributes:
        by_output: names of the parameters and buffers with one row an output.
    """

    by_output: tuple[str, ...]

    def __init__(self, width: int) -> None:
        super().__init__()
        require_integer("width", width, least=1)
        self.width = width

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return len(getattr(self, self.by_output[0]))

    def grow(self, outputs: int) -> None:
        """Grow to `outputs`, old rows kept; nothing happens where the head has as many already."""
        require_integer("outputs", outputs)
        if outputs > self.outputs:
            self._resize(dict.fromkeys(self.by_output, outputs))

    def fresh(self, name: str, like: Tensor) -> Tensor:  # noqa: ARG002
        """New rows of `name`, of the shape, type and device of `like`: zero."""
        return torch.zeros_like(like)

    @abstractmethod
    def forward(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Logits (n, C) of features (n, d)."""

    def _resize(self, rows: dict[str, int]) -> None:
        for name, count in rows.items():
            old = getattr(self, name)
            kept = old.detach()[:count]
            added = self.fresh(name, kept.new_empty(count - len(kept), *kept.shape[1:]))
            value = torch.cat([kept, added])
            setattr(self, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = {name: state_dict[prefix + name] for name in self.by_output if prefix + name in state_dict}
        self._resize({name: len(value) for name, value in saved.items() if len(value) != len(getattr(self, name))})
        super()._load_from_state_dict(state_dict, prefix, *rest)


class StreamedHead(Head):
    """A head in closed form: `observe` batches in any order, `solve`, then call it.

    It keeps sums over samples, in float64, and no sample. Logits are float64 and each row depends on its own features
    alone; an output without one sample has the logit `UNSEEN`. A subclass says in `absorb` what it adds up, in `fit`
    what follows from it and in `scores` how that classifies.

    Attributes:
        counts: (C,) samples observed of each output.
        stale: whether samples came after the last `solve`.
    """

    by_output: tuple[str, ...] = ("counts",)
    counts: Int[Tensor, " C"]
    stale: Tensor

    def __init__(self, width: int, outputs: int = 0) -> None:
        super().__init__(width)
        require_integer("outputs", outputs)
        self.register_buffer("counts", torch.zeros(outputs, dtype=torch.int64))
        self.register_buffer("stale", torch.tensor(False))

    def observe(self, phi: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Take in a batch.

        Args:
            phi: (n, d) features, of any floating type.
            labels: (n,) outputs.

        Raises:
            ValueError: features of another width, NaN or infinite; labels that are no output of the head; a head that
                was cast below float64.
        """
        self._check(phi, labels)
        labels = labels.to(phi.device)
        self.absorb(phi.detach().double(), labels)
        self.counts += torch.bincount(labels, minlength=self.outputs)
        self.stale.fill_(True)

    def solve(self) -> None:
        """Make of all that was observed what `forward` needs.

        Raises:
            ValueError: nothing was observed, or what was observed determines no solution.
        """
        if not self.counts.any():
            raise complaint(
                f"no sample was observed for {self.outputs} outputs", "at least one", "Call observe(phi, labels) first."
            )
        self.fit()
        self.stale.fill_(False)

    def forward(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Logits (n, C), float64.

        Raises:
            ValueError: samples were observed since the last `solve`; features of another width.
        """
        if self.stale:
            raise complaint("samples were observed after the last solve", "a solved head", "Call solve() first.")
        self._check_width(phi)
        return self.scores(phi.double()).masked_fill(self.counts == 0, UNSEEN)

    @abstractmethod
    def absorb(self, phi: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Add a checked float64 batch to the sums; `counts` does not hold it yet."""

    def fit(self) -> None:
        """Solve for what `scores` needs; nothing by default."""

    @abstractmethod
    def scores(self, phi: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Logits of float64 features, outputs without a sample included (they are overwritten)."""

    def _check(self, phi: Tensor, labels: Tensor) -> None:
        self._check_width(phi)
        require_finite("features", phi)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.outputs:
            raise complaint(
                f"labels from {int(labels.min())} to {int(labels.max())} for {self.outputs} outputs",
                f"labels in [0, {self.outputs})",
                "Call grow(outputs) before observe.",
            )
        low = [
            name for name, value in self.named_buffers() if value.is_floating_point() and value.dtype != torch.float64
        ]
        if low:
            raise complaint(
                f"the sums {low} of this head were cast below float64",
                "float64",
                "Cast the backbone alone: model.backbone.half(), not model.half().",
            )

    def _check_width(self, phi: Tensor) -> None:
        if phi.shape[1] != self.width:
            raise complaint(
                f"features of shape {tuple(phi.shape)} for a head of width {self.width}",
                f"(n, {self.width})",
                "Build the head with the width of the backbone's features.",
            )
