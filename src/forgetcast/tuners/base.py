r"""The contract of tuners: what trains, and in which activation spaces its updates act.

A trainable matrix M (a x b) acts on old inputs through X M^T (rows of X on its right side) or through S M (rows of S
on its left). An update D leaves old outputs alone if X D^T = 0, or S D = 0. A site says for its parameters which of the
two holds and how the rows are seen while the model runs; whoever projects, measures or reports reads sites, and does
not ask which tuner made them.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forgetcast.checks import complaint

TUNER_FILE = "tuner.safetensors"
Seen = Callable[[Float[Tensor, "k n t d"]], None]
"""Takes rows of k blocks, n samples, t tokens a sample (or a multiple: all heads of the first token on), width d."""
Conditions = Literal["corrected", "paper"]
CONDITIONS: tuple[Conditions, ...] = ("corrected", "paper")


@dataclass(frozen=True, eq=False)
class Space:
    """Rows of activations on which parameters act.

    Attributes:
        name: of what is seen, for tables.
        width: d.
        blocks: k independent ones, such as heads.
        watch: while its context is open, every forward pass gives its rows (k, n, t, d) to the function.
        fold: where smaller rows are watched, in blocks of their own: from their second moments (h, w, w) to those of
            this space (k, d, d).
    """

    name: str
    width: int
    blocks: int
    watch: Callable[[Seen], AbstractContextManager[None]]
    fold: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """Parameters that act together, as k matrices (a, b).

    Attributes:
        names: of the parameters in the model.
        parameters: one (a, k b), such as heads side by side; or a weight and its bias, which is the last column.
        blocks: k.
        right: rows X of width b with output X M^T; None if nothing is known there.
        left: rows S of width a with output S M.
        centred: of rows that are divided by their spread, what their spread is the norm of (k, a, b); such norms
            must stay as well.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    blocks: int = 1
    right: Space | None = None
    left: Space | None = None
    centred: Callable[[Tensor], Tensor] | None = None

    def matrix(self, tensors: Sequence[Tensor] | None = None) -> Float[Tensor, "k a b"]:
        """The parameters, or tensors of their shapes, block by block."""
        weight, *bias = self.parameters if tensors is None else tensors
        joined = torch.cat([weight, bias[0][:, None]], 1) if bias else weight
        return joined.reshape(len(joined), self.blocks, -1).transpose(0, 1)

    def split(self, matrix: Float[Tensor, "k a b"]) -> tuple[Tensor, ...]:
        """The reverse of `matrix`."""
        joined = matrix.transpose(0, 1).flatten(1)
        parts = (joined[:, :-1], joined[:, -1]) if len(self.parameters) > 1 else (joined,)
        return tuple(part.reshape(like.shape) for part, like in zip(parts, self.parameters, strict=True))


class Part(nn.Module, ABC):
    """A module that a tuner puts into a model and that says what its parameters act on."""

    @abstractmethod
    def sites(self, name: str, conditions: Conditions) -> tuple[Site, ...]:
        """Its trainable parameters with their spaces.

        Args:
            name: of this module in the model.
            conditions: "corrected", which is exact; "paper", as PEGP's equations have them.
        """


class Tuned(ABC):
    """A model with a tuner in place. Its parts train; everything else is frozen."""

    def __init__(self, model: nn.Module, options: Any, trained: Mapping[str, bool]) -> None:
        """With the options of the tuner, and which parameters of the model trained before."""
        self.model = model
        self.options = options
        self.trained = dict(trained)

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The tuner's parameters by their names in the model."""

    @abstractmethod
    def sites(self, conditions: Conditions = "corrected") -> tuple[Site, ...]:
        """Every trainable parameter with the spaces in which it acts."""

    @abstractmethod
    def detach(self) -> nn.Module:
        """Take the tuner out again: the model computes what it did before."""

    def merge(self) -> nn.Module:
        """Add the tuner's effect to the frozen weights and take it out.

        Raises:
            ValueError: a tuner whose effect is not linear in its input.
        """
        raise complaint(
            f"merging a {type(self).__name__}",
            "a tuner that adds a linear map to a linear layer (LoRA)",
            "Keep it in place, or save it beside the model.",
        )

    def thawed(self) -> nn.Module:
        """The model, in which the parameters train again that did before."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trained.get(name, parameter.requires_grad))
        return self.model

    def parameters(self) -> list[nn.Parameter]:
        """The tuner's parameters."""
        return list(self.named_parameters().values())

    def state(self) -> dict[str, Tensor]:
        """The tuner's parameters, detached."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def save(self, folder: str | Path) -> None:
        """Write the parameters as `tuner.safetensors`, which appears whole or not at all.

        Raises:
            ValueError: a tuner that has been taken out.
        """
        folder = self.folder(folder)
        part = folder / f"{TUNER_FILE}.part"
        state = {name: value.contiguous() for name, value in self.state().items()}
        save_file(state, part, metadata={"tuner": json.dumps(_described(self.options))})
        part.replace(folder / TUNER_FILE)

    def folder(self, folder: str | Path) -> Path:
        """Make a folder to save in; a tuner that has been taken out has nothing to save."""
        if not self.named_parameters():
            raise complaint(
                f"a {type(self).__name__} that is in no model any more",
                "one in place",
                "Save before detach() or merge().",
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, folder: str | Path) -> None:
        """Read parameters that `save` wrote.

        Raises:
            ValueError: no such file, or of another tuner.
        """
        path = Path(folder) / TUNER_FILE
        if not path.exists():
            raise complaint(f"no {TUNER_FILE} in {folder}", "a folder that save() wrote", "Check the path.")
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("tuner")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        saved, own = json.loads(kind or "{}"), _described(self.options)
        if {**own, **saved, "layers": None} != {**own, "layers": None} or "tuner" not in saved:
            raise complaint(f"{path} holds {kind}", f"{json.dumps(own)}", "Attach the tuner that was saved.")
        self.load_state(state)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put parameters back.

        Raises:
            ValueError: other names or shapes than this tuner has; then nothing is changed.
        """
        own = self.named_parameters()
        wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise complaint(
                f"a state that differs in {wrong[:3]} ({len(wrong)} such parameters)",
                f"the {len(own)} parameters of this {type(self).__name__}",
                "Attach the tuner with the options that it was saved with, to the same model.",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def _described(options: Any) -> dict[str, Any]:
    """A tuner and its options as JSON values. Which layers have it is known from the names of the parameters."""
    return {"tuner": type(options).__name__, **asdict(options)}


def inputs_of(module: nn.Module, name: str, width: int, constant: bool = False) -> Space:
    """The rows that a linear layer gets; with `constant` a 1 at the end of each, on which the bias acts."""

    @contextmanager
    def watch(seen: Seen) -> Iterator[None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            rows = (given[0] if given else named["input"]).detach()
            rows = rows.reshape(len(rows), -1, width)
            seen((torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2) if constant else rows)[None])

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return Space(name, width + constant, 1, watch)


def linear_sites(model_name: str, module: nn.Linear, conditions: Conditions = "corrected") -> tuple[Site, ...]:
    """Weight, and bias if it trains, of a linear layer: both act on its inputs. The paper leaves biases free."""
    held = {
        f"{model_name}.{name}": value for name, value in module.named_parameters(recurse=False) if value.requires_grad
    }
    if f"{model_name}.weight" not in held:
        raise complaint(
            f"{model_name} trains {sorted(held) or 'nothing'}",
            "a weight that trains",
            "Freeze its bias, or let both train.",
        )
    rows = inputs_of(module, model_name, module.in_features, constant=len(held) > 1 and conditions == "corrected")
    if len(held) == 1 or conditions == "corrected":
        return (Site(tuple(held), tuple(held.values()), right=rows),)
    (weight, bias), (matrix, vector) = held, held.values()
    return Site((weight,), (matrix,), right=rows), Site((bias,), (vector,))


def freeze(model: nn.Module) -> dict[str, bool]:
    """No parameter of the model trains any more; returns which did."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    return trained


def require_untuned(model: nn.Module) -> None:
    """Raise if the model holds parts of a tuner already: two would freeze each other."""
    named = model.named_modules()
    tuned = [name for name, part in named if isinstance(part, Part) or name.rsplit(".", 1)[-1] == "lora_A"]
    if tuned:
        raise complaint(f"a model with a tuner in place ({tuned[0]})", "one without", "Detach or merge it first.")
