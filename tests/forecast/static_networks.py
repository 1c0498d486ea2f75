"""Small networks of several kinds, with old and new inputs, in float64."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from builders import DOUBLE

CLASSES = 4


class Reader(nn.Module):
    """An embedding, fused attention and a head: inputs by name, logits by name."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(12, 8), nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, *, tokens):
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in self.mix(self.embedding(tokens)).chunk(3, -1))
        return {"logits": self.head(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))}


def perceptron():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    return model, torch.randn(6, 5, dtype=DOUBLE), torch.randn(9, 5, dtype=DOUBLE)


def convolution():
    layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(27, CLASSES)
    model = nn.Sequential(*layers).double()
    return model, torch.randn(6, 1, 4, 4, dtype=DOUBLE), torch.randn(9, 1, 4, 4, dtype=DOUBLE)


def reader():
    model = Reader().double()
    return model, {"tokens": torch.randint(0, 12, (6, 5))}, {"tokens": torch.randint(0, 12, (9, 5))}


def small_head():
    """Fewer parameters than samples x outputs."""
    model, old, new = perceptron()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model, old, new[:, :5].repeat(2, 1) + 0.1 * torch.randn(18, 5, dtype=DOUBLE)


NETWORKS = {make.__name__: make for make in (perceptron, convolution, reader, small_head)}


def network(name, seed=0):
    torch.manual_seed(seed)
    model, old, new = NETWORKS[name]()
    model.eval()
    count = len(new["tokens"] if isinstance(new, dict) else new)
    return model, old, new, torch.randint(2, CLASSES, (count,))


def outputs_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)["logits"] if isinstance(inputs, dict) else model(inputs)
