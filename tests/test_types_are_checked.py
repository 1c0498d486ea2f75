"""The tests check shapes and types at run time; a user's run does not."""

import pytest
import torch
from jaxtyping import TypeCheckError

from forgetcast.forecast.network.diagnostics import margins

SAMPLES, WRONG = torch.zeros(4, 3), torch.zeros(4, 3, 2)


def test_a_wrong_shape_is_caught():
    labels = torch.zeros(4, dtype=torch.long)
    margins(SAMPLES, labels)
    with pytest.raises(TypeCheckError, match="margins"):
        margins(WRONG, labels)


@pytest.mark.usefixtures("unchecked_types")
def test_unless_a_test_runs_as_a_user_does():
    with pytest.raises(RuntimeError, match="same number of dimensions"):
        margins(WRONG, torch.zeros(4, dtype=torch.long))
