"""A method's model as a forecast takes it."""

from torch import nn

from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Model


def viewed(model: Model) -> nn.Module:
    """The model with its linear head as an `nn.Linear`, by which a forecast knows it; any other head as it is."""
    head = model.head
    if not isinstance(head, Linear):
        return model
    layer = nn.Linear(head.width, head.outputs, bias=head.bias is not None, device="meta")
    layer.weight = head.weight
    layer.register_parameter("bias", head.bias)
    return nn.Sequential(model.backbone, layer)
