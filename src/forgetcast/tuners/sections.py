r"""Several features of one sample from one frozen transformer: a section for each pass.

    phi(x) = [pretrained (optional), averaged, current]          for each of two branches, adapters and prompts

Adapters and prompts train in the current passes; the averaged ones have their running mean over tasks,

    uniform:      mean_t = mean_{t-1} + (theta_t - mean_{t-1}) / (t + 1)
    exponential:  mean_t = decay mean_{t-1} + (1 - decay) theta_t,   mean_0 = theta_0

and the pretrained one, which both branches share, has nothing. Averaged and pretrained passes take no gradient, and
their features of a sample stand still until the mean takes in the next parts.

Source: arXiv 2407.17120, whose "adaptive" average is the uniform one.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint, require_number
from forgetcast.tuners.anatomy import Anatomy, widths
from forgetcast.tuners.first_token import FirstToken
from forgetcast.tuners.stream import Pass, Stream

Begin = Callable[[nn.ModuleList], Pass]
Make = Callable[[], nn.Module]


class Branch(nn.Module):
    """Parts that train, one a block, and their running mean.

    Args:
        make: makes the part of a block.
        blocks: how many.
        begin: makes a pass of parts.
    """

    def __init__(self, make: Make, blocks: int, begin: Begin) -> None:
        super().__init__()
        self.current = nn.ModuleList(make() for _ in range(blocks))
        self.average = nn.ModuleList(make() for _ in range(blocks)).requires_grad_(False)
        self.average.load_state_dict(self.current.state_dict())
        self.begin = begin

    def fold(self, tasks: int, decay: float | None = None) -> None:
        """Take the current parts into the running mean of `tasks` earlier ones; with a decay the exponential one."""
        if decay is not None:
            require_number("decay", decay, most=1.0)
        weight = 1.0 if tasks == 0 else 1 / (tasks + 1) if decay is None else 1 - decay
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.current.parameters(), strict=True):
                mean.lerp_(value, weight)


class Sections(nn.Module):
    """A frozen transformer with two branches.

    Args:
        backbone: maps inputs to features (n, d); frozen here.
        parts: where its blocks are, by names in the backbone.
        branches: the two.
        pretrained: whether there is a section without any part.
        still: whether averaged parts are in evaluation mode also while the others train.
        first_token: whether features are of the first token alone (`reads_first_token_alone`), so that the last
            feed-forward network need not read the others.

    Attributes:
        count: S, sections of a branch.
        width: d.
    """

    def __init__(
        self,
        backbone: nn.Module,
        parts: Anatomy,
        branches: Sequence[Branch],
        *,
        pretrained: bool,
        still: bool = True,
        first_token: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.branches = nn.ModuleList(branches)
        self.pretrained, self.still, self.first_token = pretrained, still, first_token
        self.last = len(parts.blocks) - 1
        self.count = 2 + pretrained
        self.width = width_of(backbone, parts)
        self.stream = Stream(backbone, parts)

    def forward(self, inputs: Tensor, standing: Float[Tensor, "n 2 s d"] | None = None) -> Float[Tensor, "n 2 S d"]:
        """Features by branch and section.

        Args:
            inputs: samples.
            standing: the sections before the current ones, s = S - 1, where they are known already.

        Cost: two passes with gradient; without `standing` two without, one more with a pretrained section.
        """
        with torch.no_grad():
            shared = [self._run(Pass(), inputs)] if self.pretrained and standing is None else []
        found = []
        for place, branch in enumerate(cast("Sequence[Branch]", self.branches)):
            if standing is None:
                with torch.no_grad():
                    earlier = torch.stack([*shared, self._run(branch.begin(branch.average), inputs)], 1)
            else:
                earlier = standing[:, place]
            current = self._run(branch.begin(branch.current), inputs)
            found.append(torch.cat([earlier.to(current), current[:, None]], 1))
        return torch.stack(found, 1)

    def train(self, mode: bool = True) -> "Sections":
        """The transformer stays in evaluation mode, and so do averaged parts that are to stand still."""
        super().train(mode)
        self.backbone.eval()
        for branch in cast("Sequence[Branch]", self.branches):
            branch.average.train(mode and not self.still)
        return self

    def fold(self, tasks: int, decay: float | None = None) -> None:
        """As `Branch.fold`, of both."""
        for branch in cast("Sequence[Branch]", self.branches):
            branch.fold(tasks, decay)

    def _run(self, one: Pass, inputs: Tensor) -> Float[Tensor, "n d"]:
        with self.stream.along(FirstToken(one, self.last) if self.first_token else one):
            found: Tensor = self.backbone(inputs)
        return found


def width_of(backbone: nn.Module, parts: Anatomy) -> int:
    """Channels of the stream."""
    return widths(backbone.get_submodule(parts.blocks[0].enter))[0]


def tokens_of(backbone: nn.Module, parts: Anatomy, inputs: Tensor) -> int:
    """Tokens a sample in the stream. Cost: one forward pass of two samples.

    Raises:
        ValueError: a stream without an axis of tokens.
    """
    seen: list[tuple[int, ...]] = []

    class Look(Pass):
        def enter(self, block: int, stream: Tensor) -> Tensor:  # noqa: ARG002
            seen.append(tuple(stream.shape))
            return stream

    stream = Stream(backbone, parts)
    try:
        with torch.no_grad(), stream.along(Look()):
            backbone(inputs[:2])
    finally:
        stream.remove()
    if not seen or len(seen[0]) != 3:
        raise complaint(f"a stream of shape {seen[:1]}", "(n, tokens, width)", "Give a transformer.")
    return seen[0][1]
