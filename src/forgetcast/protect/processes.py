"""What processes that share each batch exchange, so that all of them remember the same."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed

from forgetcast.methods.base import Batch
from forgetcast.protect.parameters import padded


def whole_columns(batch: Batch, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns of this process's share as columns of the whole batch, in its order, the same on every process.

    Args:
        batch: the share.
        columns: tensors (n, ...), one row for each of its samples.

    Cost: one exchange a column of as many bytes as the whole batch has; nothing where the batch is not shared.
    """
    if batch.rows is None:
        return dict(columns)
    processes = distributed.get_world_size()
    longest = -(-batch.rows // processes)
    whole = {}
    for name, column in columns.items():
        own = padded(column, (longest, *column.shape[1:]))
        parts = [torch.empty_like(own) for _ in range(processes)]
        distributed.all_gather(parts, own)
        # sample i is with process i mod their number: a padded row can only come last
        whole[name] = torch.stack(parts, 1).flatten(0, 1)[: batch.rows]
    return whole


def own_rows(batch: Batch) -> int:
    """How many samples of a shared batch are this process's own; 0 where it only has one to keep step."""
    return len(range(distributed.get_rank(), batch.rows or 0, distributed.get_world_size()))


def of_whole_batch(
    batch: Batch,
    z: Float[Tensor, "n d"],
    term: Callable[[Float[Tensor, "_ d"], Int[Tensor, " _"]], Float[Tensor, ""]],
) -> Float[Tensor, ""]:
    """A term about pairs of samples, of the whole batch also where processes share it.

    The loop weighs each process's loss with its share of the samples and adds the gradients up: each process makes the
    value of the whole batch, and the gradient of its own samples, divided by its share.

    Args:
        batch: the share.
        z: (n, d) features of its samples.
        term: of features and labels.

    Cost: one exchange of the features.
    """
    if batch.rows is None:
        return term(z, batch.labels)
    columns = whole_columns(batch, {"z": z.detach(), "labels": batch.labels})
    count, whole = own_rows(batch), columns["z"].clone()
    if count:
        whole[distributed.get_rank() :: distributed.get_world_size()] = z[:count]
    value = term(whole, columns["labels"])
    return value.detach() + (value - value.detach()) * (batch.rows / count if count else 0.0)
