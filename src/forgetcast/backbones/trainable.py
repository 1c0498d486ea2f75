"""Which parameters of a backbone train; one of which none does stays as it is, dropout and statistics included."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetcast.checks import complaint

Trainable = Literal["none", "all"] | Sequence[str]


class Frozen(nn.Module):
    """A backbone of which nothing trains: no gradient, and evaluation mode whatever mode the model around it is in.

    Args:
        backbone: maps inputs to features (n, d).
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Frozen":  # noqa: ARG002
        """Stay in evaluation mode: dropout would act, and running statistics would move although nothing trains."""
        super().train(False)
        return self

    def forward(self, inputs: Tensor) -> Float[Tensor, "n d"]:
        """Features of a batch, without gradient."""
        with torch.no_grad():
            phi: Tensor = self.backbone(inputs)
        return phi


def choose_trainable(backbone: nn.Module, network: nn.Module, choice: Trainable, inputs: Tensor) -> nn.Module:
    """Set `requires_grad` of a backbone's parameters.

    Args:
        backbone: maps inputs to features (n, d).
        network: the part of it whose names the patterns match.
        choice: "none"; "all", which means every parameter that the features depend on (a pooler that nothing reads
            stays frozen); or patterns of parameter names, such as "encoder.layer.11.*".
        inputs: some samples, which show what the features depend on.

    Returns:
        The backbone; wrapped in `Frozen` for "none".

    Raises:
        ValueError: a pattern that no parameter's name matches, or no parameter that the features depend on.

    Cost: for "all", one forward and backward pass of `inputs`.
    """
    if choice == "none":
        return Frozen(backbone)
    backbone.requires_grad_(True)
    if choice == "all":
        named = dict(backbone.named_parameters())
        if not named:
            raise complaint("a backbone without parameters", "some to train", "Leave model.trainable out.")
        training = backbone.training
        with torch.enable_grad():
            total = backbone.eval()(inputs).sum()
            reached = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        backbone.train(training)
        for parameter, gradient in zip(named.values(), reached, strict=True):
            parameter.requires_grad_(gradient is not None)
        return backbone
    names = [name for name, _ in network.named_parameters()]
    for pattern in choice:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise complaint(
                f"the pattern {pattern!r} matches no parameter",
                f"names such as {near}",
                "Write * for any part of a name.",
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in choice))
    return backbone
