"""Small networks of every kind that is fine-tuned, and tasks for them: 2 old classes, 3 new ones."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

DOUBLE = torch.float64
OUTPUTS = 5
NEW = (2, 3, 4)
WORDS, LENGTH, WIDTH = 13, 4, 8


class Reader(nn.Module):
    """One block of a transformer that reads words, frozen, with what a tuner adds to it, and a head."""

    def __init__(self, **tuned: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.requires_grad_(False)
        for name, part in tuned.items():
            setattr(self, name, part)
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, *, tokens: Tensor) -> dict[str, Tensor]:
        h = self.embedding(tokens)
        if hasattr(self, "prompt"):
            h = torch.cat([self.prompt.expand(len(h), -1, -1), h], 1)
        query, key, value = self.query(h), self.key(h), self.value(h)
        if hasattr(self, "prefix"):
            more = self.prefix[:, None].expand(-1, len(h), -1, -1)
            key, value = torch.cat([more[0], key], 1), torch.cat([more[1], value], 1)
        h = h + self.out(torch.softmax(query @ key.mT / WIDTH**0.5, 2) @ value)
        h = h + self.down(gelu(self.up(h)))
        if hasattr(self, "adapter"):
            h = h + self.adapter(h)
        return {"logits": self.head(h.mean(1))}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, OUTPUTS))


def lora() -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that has been replaced
        model = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]), Reader())
    model.head.requires_grad_(True)
    return model


def adapter() -> nn.Module:
    return Reader(adapter=nn.Sequential(nn.Linear(WIDTH, 3), nn.GELU(), nn.Linear(3, WIDTH)))


def prefix() -> nn.Module:
    return Reader(prefix=nn.Parameter(torch.randn(2, 2, WIDTH)))


def prompt() -> nn.Module:
    return Reader(prompt=nn.Parameter(torch.randn(2, WIDTH)))


TUNERS: dict[str, Callable[[], nn.Module]] = {made.__name__: made for made in (lora, adapter, prefix, prompt)}
NETWORKS = {"perceptron": perceptron} | TUNERS


def network_and_task(name: str, *, old: int = 12, new: int = 23, dtype: torch.dtype = DOUBLE, seed: int = 0):
    """A network, old samples (inputs, labels) and new ones."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().to(dtype)

    def samples(count: int, low: int, high: int):
        labels = torch.randint(low, high, (count,))
        if name == "perceptron":
            return torch.randn(count, 6, dtype=dtype) + labels[:, None] / 2, labels
        words = torch.randint(0, WORDS, (count, LENGTH))
        words[:, 0] = labels  # something to learn
        return {"tokens": words}, labels

    return model, samples(old, 0, 2), samples(new, 2, OUTPUTS)
