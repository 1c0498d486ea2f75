"""Bar: projected steps cost at most 5 % of a training step; a basis grows 5 times faster than by GPM's two SVDs."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from benchmarks.machine import floor, interleaved, save, spread
from forgetcast.protect.projection import Projection
from forgetcast.protect.restraint import protect
from forgetcast.protect.spaces import Basis, Moment
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA

BATCH, CLASSES, TOKENS, ROUNDS = 32, 10, 20, 21
ROWS, WIDTHS, THRESHOLD, UPDATE_ROUNDS = 20_000, (192, 384, 768), 0.95, 5
STEP_BAR, UPDATE_BAR, SAME = 0.05, 5.0, 1e-5
TUNERS = {"LoRA, r = 4, query and value": LoRA(rank=4), "adapter, r = 8": Adapter(rank=8)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-Tiny at 112 pixels: 50 tokens."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    model = ViTModel(ViTConfig(**sizes, image_size=112, patch_size=16), add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(BATCH, 3, 112, 112)}


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    """A six-layer sentence encoder, texts of 20 tokens."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    return model, {"input_ids": torch.randint(1, 30_000, (BATCH, TOKENS))}


def half_full(projection: Projection) -> Projection:
    """Random directions in half of every space."""
    spaces = [space for site in projection.sites for space in (site.right, site.left) if space is not None]

    def drawn(width: int) -> Tensor:
        return torch.linalg.qr(torch.randn(width, width // 2, dtype=torch.float64)).Q

    known = {one.name: Basis(tuple(drawn(one.width) for _ in range(one.blocks)), one.width) for one in spaces}
    return replace(projection, known=known)


def overhead(made: Callable[[], tuple[nn.Module, dict[str, Tensor]]], tuner: Any) -> dict[str, Any]:
    """A step with and without projection, in turn: their difference as a share, round by round."""
    torch.manual_seed(0)
    model, batch = made()
    tuned = tuner.attach(model)
    head = nn.Linear(model.config.hidden_size, CLASSES)
    labels = torch.arange(BATCH) % CLASSES
    optimizer = torch.optim.AdamW([*tuned.parameters(), *head.parameters()], lr=1e-4)
    projection = half_full(Projection(tuned.sites()))

    def step() -> None:
        optimizer.zero_grad()
        hidden = model(**batch).last_hidden_state[:, 0]
        nn.functional.cross_entropy(head(hidden), labels).backward()
        optimizer.step()

    def projected() -> None:
        with protect(optimizer, projection):
            step()

    def alone() -> None:
        with protect(optimizer, projection):
            optimizer.step()

    times = interleaved({"plain": step, "projected": projected, "optimiser": optimizer.step, "both": alone}, ROUNDS)
    ratios = [after / before - 1 for after, before in zip(times["projected"], times["plain"], strict=True)]
    own = median(after - before for after, before in zip(times["both"], times["optimiser"], strict=True))
    return {
        "sites": len(projection.sites),
        "plain_seconds": spread(times["plain"]),
        "projected_seconds": spread(times["projected"]),
        "overhead_median": median(ratios),
        "projection_alone_seconds": own,
        "projection_alone_share": own / median(times["plain"]),
        "bar": STEP_BAR,
    }


def gpm(basis: Tensor, rows: Tensor) -> Tensor:
    """GPM's update from stored rows: one SVD of the rows for their energy, one of what the basis leaves of them."""
    total = torch.linalg.svdvals(rows).square().sum()
    residual = rows - rows @ basis @ basis.T
    _, values, vectors = torch.linalg.svd(residual, full_matrices=False)
    held = total - values.square().sum()
    wanted = int((held + values.square().cumsum(0) < THRESHOLD * total).sum()) + 1
    return torch.cat([basis, vectors[:wanted].T], 1)


def update(width: int) -> dict[str, Any]:
    """The second task's directions, with those of the first in place."""
    torch.manual_seed(width)
    decay = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    mixings = [torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q for _ in range(2)]
    first, second = (torch.randn(ROWS, width, dtype=torch.float64) * decay @ mixing for mixing in mixings)
    known = Basis.empty(1, width).grown(Moment((first.T @ first)[None]), 0.6)
    moment = Moment((second.T @ second)[None])
    rows = second.float()
    work = {
        "forgetcast": lambda: known.grown(moment, THRESHOLD),
        "gpm": lambda: gpm(known.directions[0].float(), rows),
    }
    times = interleaved(work, UPDATE_ROUNDS)
    mine, reference = known.grown(moment, THRESHOLD).directions[0], gpm(known.directions[0], second)
    difference = float((mine @ mine.T - reference @ reference.T).norm(2))
    faster = [slow / quick for slow, quick in zip(times["gpm"], times["forgetcast"], strict=True)]
    return {
        "rows": ROWS,
        "directions": [known.ranks[0], mine.shape[1], reference.shape[1]],
        "forgetcast_seconds": spread(times["forgetcast"]),
        "gpm_float32_seconds": spread(times["gpm"]),
        "times_faster_median": median(faster),
        "bar": UPDATE_BAR,
        "distance_of_subspaces": difference,
        "bar_of_distance": SAME,
    }


def run() -> dict[str, Any]:
    models = {"ViT-Tiny, 112 pixels": vit, "MiniLM, 20 tokens": minilm}
    return {
        "machine": floor(),
        "step": {
            name: {kind: overhead(made, tuner) for kind, tuner in TUNERS.items()} for name, made in models.items()
        },
        "basis": {str(width): update(width) for width in WIDTHS},
    }


if __name__ == "__main__":
    save("projection_speed", run())
