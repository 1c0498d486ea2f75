r"""What runs along the stream of tokens between the attention and the feed-forward network of each block.

    x <- x + attention(norm(x));     x <- x + f(norm'(x))            blocks that normalise before
                                 ^ here

A pass sees the stream there, may give the feed-forward network another one to read, and may change what comes of it.
Several passes can run through one model, one after the other, without knowing of each other; without any the model is
as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from forgetcast.checks import complaint
from forgetcast.tuners.anatomy import Anatomy


class Pass:
    """One forward pass through all blocks; may keep what it needs from one call to the next."""

    def enter(self, block: int, stream: Tensor) -> Tensor:  # noqa: ARG002
        """What the normalisation before the feed-forward network reads in place of the stream (n, t, d)."""
        return stream

    def leave(self, block: int, found: Tensor) -> Tensor:  # noqa: ARG002
        """What is added to the stream in place of the network's output (n, t, d)."""
        return found

    def behind(self, block: int, stream: Tensor) -> Tensor:  # noqa: ARG002
        """What goes into the next block in place of this one's output (n, t, d)."""
        return stream


class Stream:
    """Hooks in a model through which passes run.

    Args:
        model: a transformer whose blocks normalise before attention and before the feed-forward network.
        parts: where its blocks are.

    Raises:
        ValueError: a block without these normalisations.
    """

    def __init__(self, model: nn.Module, parts: Anatomy) -> None:
        missing = [block.name for block in parts.blocks if block.middle is None]
        if missing:
            raise complaint(
                f"the blocks {missing} of {type(model).__name__}",
                "blocks that normalise before attention and before the feed-forward network, as those of a ViT",
                "Name norm= and middle= in the anatomy, or take another model.",
            )
        self.running: dict[int, Pass] = {}
        self.handles: list[RemovableHandle] = []
        for place, block in enumerate(parts.blocks):
            middle, leave = model.get_submodule(str(block.middle)), model.get_submodule(block.leave)
            self.handles += [
                middle.register_forward_pre_hook(partial(self._enter, place)),
                leave.register_forward_hook(partial(self._leave, place)),
                model.get_submodule(block.name).register_forward_hook(partial(self._behind, place)),
            ]

    @contextmanager
    def along(self, one: Pass) -> Iterator[None]:
        """A pass runs through every call of the model inside, in this thread."""
        thread = get_ident()
        before = self.running.get(thread)
        self.running[thread] = one
        try:
            yield
        finally:
            if before is None:
                del self.running[thread]
            else:
                self.running[thread] = before

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _enter(self, place: int, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        one = self.running.get(get_ident())
        return None if one is None else (one.enter(place, given[0]), *given[1:])

    def _leave(self, place: int, _: nn.Module, __: tuple[Any, ...], found: Tensor) -> Tensor | None:
        one = self.running.get(get_ident())
        return None if one is None else one.leave(place, found)

    def _behind(self, place: int, _: nn.Module, __: tuple[Any, ...], found: Any) -> Any:
        one = self.running.get(get_ident())
        if one is None:
            return None
        if isinstance(found, tuple):
            return (one.behind(place, found[0]), *found[1:])
        return one.behind(place, found)
