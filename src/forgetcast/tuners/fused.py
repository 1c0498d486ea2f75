"""Sections of two branches fused into one feature, and the proxies of classes that a task trains them with.

    z (n, 2, S, d) of adapters and prompts -> z_f (n, S d),        logits sigma cos(z, w_c) of the task's classes

Source: arXiv 2407.17120; cost and fusion as `Sections` and `heads/fusion.py` say.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint
from forgetcast.heads.cosine import Cosine, proxies
from forgetcast.tuners.anatomy import Anatomy
from forgetcast.tuners.sections import Sections


class FusedSections(nn.Module):
    """A transformer with two branches of sections, fused into its features; made when the number of tokens is known.

    Args:
        backbone: a transformer that normalises before attention and feed-forward network.
        parts: where its blocks are.
        make: of the backbone, its number of tokens and whether features are of the first alone, the sections and the
            fusion.
    """

    def __init__(
        self, backbone: nn.Module, parts: Anatomy, make: Callable[[nn.Module, int, bool], tuple[Sections, nn.Module]]
    ) -> None:
        super().__init__()
        self.backbone: nn.Module | None = backbone.requires_grad_(False)
        self.parts, self.make = parts, make
        self.tokens, self.first_token = 0, False
        self.sections: Sections | None = None
        self.fusion: nn.Module | None = None
        self.proxy: Cosine | None = None

    def build(self, tokens: int, first_token: bool) -> None:
        """Put the branches in."""
        assert self.backbone is not None
        device = next(self.backbone.parameters()).device
        sections, fusion = self.make(self.backbone, tokens, first_token)
        self.tokens, self.first_token, self.backbone = tokens, first_token, None
        self.sections, self.fusion = sections.to(device), fusion.to(device)
        self.train(self.training)

    def propose(self, classes: int, scale: float) -> Cosine:
        """New proxies for the classes of a task."""
        assert self.sections is not None
        self.proxy = proxies(self.sections.count * self.sections.width, classes, next(self.sections.parameters()))
        self.proxy.scale.data.fill_(scale)
        return self.proxy

    def forward(self, inputs: Tensor) -> Float[Tensor, "n D"]:
        """The fused feature (n, S d)."""
        return self.three(inputs)[2]

    def three(self, inputs: Tensor, standing: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the adapters, of the prompts, and of both fused, (n, S d) each; `standing` as in `Sections`."""
        if self.sections is None or self.fusion is None:
            raise complaint("a network that has not seen a task", "begin_task first", "Learn a task.")
        sections = self.sections(inputs, standing)
        fused = self.fusion(sections)
        return sections[:, 0].flatten(1), sections[:, 1].flatten(1), fused.flatten(1)
