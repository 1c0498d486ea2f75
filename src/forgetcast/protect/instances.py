r"""Each feature apart from every other, of its own class too, and from the means of old classes.

    value = mean_i -log softmax_j( <m_i, m_j> / temperature )_i          m = [old means, features]

Products are of the features as they are: it falls as well where they grow.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy


def instances_apart(
    phi: Float[Tensor, "n d"], old: Float[Tensor, "m d"], temperature: float = 0.8
) -> Float[Tensor, ""]:
    """The value; of each row the logarithm of the share that it has itself among all.

    Args:
        phi: features.
        old: means of old classes; m may be 0.
        temperature: of the products.

    Cost: (n + m)^2 d multiply-adds.

    Source: released code of MOS (arXiv 2412.09441), which adds 0.1 times this to its loss.
    """
    rows = torch.cat([old, phi])
    return cross_entropy(rows @ rows.T / temperature, torch.arange(len(rows), device=rows.device))
