"""What processes that share each batch exchange, so that all of them remember the same."""

from collections.abc import Mapping

import torch
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
