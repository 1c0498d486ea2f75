"""What every method must hold, whatever it is: no peeking at tasks, no dependence on batches, resume bit for bit."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from small import stream
from torch import Tensor, nn
from tuned import tuned_where_needed

from forgetcast.backbones.weights import weights_hash
from forgetcast.learn.evaluate import logits_of
from forgetcast.learn.loop import Checkpointing, learn, stored_numbers
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.base import Method
from forgetcast.methods.registry import METHODS, create

CPU = torch.device("cpu")
OPTIMIZATION = Optimization(learning_rate=1e-2, epochs=4, batch_size=32)
SMALL = {
    "slca": {"samples": 32, "epochs": 2, "backbone_rate": 1e-2},
    "ranpac": {"size": 200},
    "replay": {"capacity": 40},
    "pegp": {"threshold": 0.6},
    "ssiat": {"samples": 32, "epochs": 2},
    "mos": {"rank": 8, "samples": 32, "epochs": 2, "contrast": 0.01},
    "vpt_nsp2": {"temperature": 1.0},
    "ntk_cl": {"prompts": 2, "rank": 4},
    "l2p": {"size": 5, "length": 2, "count": 2, "readout": "pooled"},
    "dualprompt": {"general_layers": (0,), "expert_layers": (1,)},
    "coda_prompt": {"components": 4, "layers": (0, 1), "orthogonality": 0.1},
    "ease": {"rank": 8},
    "inflora": {"rank": 4, "threshold": 0.6, "tasks": 3},
    "o_lora": {"rank": 4},
    "sd_lora": {"ranks": (4, 2)},
    "osf": {"ranks": (0.3, 4)},
    "lae": {"decay": 0.9, "loss_outputs": "seen"},
    "advised": {"budget": 1.0, "lengths": (0.5, 1.0), "capacity": 40},
}
CASES = (*METHODS, *(f"{name} after a first session" for name in ("ranpac", "simplecil")))


def new(name: str) -> Method:
    torch.manual_seed(5)
    name, _, session = name.partition(" after ")
    options = {**SMALL.get(name, {}), **({"first_session": True} if session else {})}
    backbone = tuned_where_needed(name, nn.Sequential(nn.Linear(64, 20), nn.ReLU()), 20)
    return create(name, backbone, 20, **options)


def read(places: np.ndarray) -> Tensor:
    return torch.from_numpy(stream().source.inputs[places])


def tensors(state, path: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: value for name, own in items for key, value in tensors(own, f"{path}/{name}").items()}


@cache
def trained(name: str) -> tuple[Method, list[list[float]]]:
    method = new(name)
    return method, learn(method, stream(), OPTIMIZATION, seed=3).accuracy_matrix


def check_no_peek(method: Method) -> None:
    """Predictions are those of each input alone: for any batch, any order, and whatever task is named last."""
    places = np.concatenate([task.test for task in stream().tasks])
    whole = logits_of(method, read, places, len(places), CPU)
    alone = logits_of(method, read, places, 1, CPU)
    assert torch.allclose(whole, alone, atol=1e-4)
    order = np.random.default_rng(0).permutation(len(places))
    shuffled = logits_of(method, read, places[order], 13, CPU)
    assert torch.allclose(whole[torch.from_numpy(order)], shuffled, atol=1e-4)
    classes = method.classes
    try:
        method.classes = stream()[0].classes
        assert torch.equal(logits_of(method, read, places, len(places), CPU), whole)
    finally:
        method.classes = classes


@pytest.mark.parametrize("name", CASES)
def test_no_peek_at_task_or_batch(name):
    check_no_peek(trained(name)[0])


class _Peeks(Method):
    """Tells the task from the batch, as a broken evaluation would."""

    def __init__(self, inner: Method, how: Callable[["_Peeks", Tensor], Tensor]) -> None:
        super().__init__(inner.model)
        self.classes, self.seen, self.how = inner.classes, inner.seen, how

    def loss(self, batch):
        raise NotImplementedError

    def predict(self, inputs):
        return self.how(self, self.model(inputs))


@pytest.mark.parametrize(
    "how",
    [
        lambda self, logits: logits + 5 * torch.eye(6)[list(self.classes)].sum(0),
        lambda self, logits: logits + 5 * torch.nn.functional.one_hot(logits.mean(0).argmax(), 6),
        lambda self, logits: (logits - logits.mean(0)) / (logits.std(0, correction=0) + 1e-3),
    ],
    ids=["task", "majority", "batch statistics"],
)
def test_a_method_that_peeks_is_caught(how):
    with pytest.raises(AssertionError):
        check_no_peek(_Peeks(trained("joint")[0], how))


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_counts_what_it_keeps(name):
    method, matrix = trained(name)
    assert np.mean([row[-1] for row in matrix]) > 0.5  # learning accuracy, chance is a third on average
    assert stored_numbers(method.state_dict()) >= stored_numbers(dict(method.model.state_dict()))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", CASES)
def test_resumed_run_is_the_whole_run(name, tmp_path):
    whole, matrix = trained(name)
    stops = [0, 0]

    checkpointing = Checkpointing(tmp_path, steps=5)
    for task in (0, 1):

        def stop(event, task=task) -> None:  # in the middle of a task, or at its end, before it is saved
            stops[task] += 1
            if event["task"] == task and (event["event"] == "task" or event.get("epoch") == 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            learn(new(name), stream(), OPTIMIZATION, seed=3, checkpointing=checkpointing, on_event=stop)
    assert min(stops) > 0
    torch.manual_seed(99)
    resumed = new(name)
    assert learn(resumed, stream(), OPTIMIZATION, seed=3, checkpointing=checkpointing).accuracy_matrix == matrix
    assert weights_hash(tensors(resumed.state_dict())) == weights_hash(tensors(whole.state_dict()))
