r"""Fusion of two branches of sections into one feature.

z (n, 2, S, d): adapters' sections z_a and prompts' sections z_p.

**Sections attend** (`SectionAttention`): each section of the adapters' asks all 2 S of them,

    fused_s = z_{a,s} + U softmax( (Q z_{a,s}) (K z)^T / sqrt(r) ) V z,      Q, K, V (r, d), U (d, r) zero at the start

**One token** (`OneToken`), as the released code of NTK-CL has it: attention from one token to one token, over the
sections side by side, D = S d wide,

    fused = 1/2 W_v z_a + z_a + 0.1 z_p

The softmax over a single key is 1 whatever queries and keys are: only weight decay and drift terms move W_q and W_k. In
training, dropout of the attention weights drops whole heads.

Source: arXiv 2407.17120; `OneToken` follows its released code.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm

from forgetcast.checks import complaint, require_integer


class SectionAttention(nn.Module):
    """Attention of rank r among all sections; at first the adapters' own.

    Args:
        width: d.
        rank: r.
    """

    def __init__(self, width: int, rank: int = 32) -> None:
        super().__init__()
        require_integer("rank", rank, least=1)
        self.query, self.key, self.value = (nn.Linear(width, rank, bias=False) for _ in range(3))
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, sections: Float[Tensor, "n 2 S d"]) -> Float[Tensor, "n S d"]:
        """Fused sections. Attention reads them normalised. Cost: 8 S d r multiply-adds a sample."""
        own, every = sections[:, 0], layer_norm(sections.flatten(1, 2), sections.shape[-1:])
        query, key, value = self.query(every[:, : own.shape[1]]), self.key(every), self.value(every)
        shares = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        fused: Tensor = own + self.up(shares @ value)
        return fused


class OneToken(nn.Module):
    """The released fusion.

    Args:
        width: D = S d.
        heads: that dropout drops.
        drop: its probability.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int = 8, drop: float = 0.1) -> None:
        super().__init__()
        require_integer("heads", heads, least=1)
        if width % heads:
            raise complaint(f"a width of {width} in {heads} heads", f"a multiple of {heads}", "Take other heads.")
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads, self.drop = heads, drop

    def forward(self, sections: Float[Tensor, "n 2 S d"]) -> Float[Tensor, "n S d"]:
        """Fused sections. Cost: D^2 multiply-adds a sample; queries and keys change nothing and are not computed."""
        adapters, prompts = sections.flatten(2).unbind(1)
        kept = dropout(adapters.new_ones(len(adapters), self.heads, 1), self.drop, self.training)
        attended = (kept * self.value(adapters).unflatten(1, (self.heads, -1))).flatten(1)
        idle = sum(
            (value.sum() for part in (self.query, self.key) for value in part.parameters()), start=kept.new_zeros(())
        )
        fused: Tensor = 0.5 * attended + adapters + 0.1 * prompts + 0 * idle  # so that decay acts on them
        return fused.reshape(sections[:, 0].shape)
