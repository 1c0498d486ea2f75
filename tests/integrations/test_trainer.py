"""The Trainer of transformers, with projected steps."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from forgetcast.integrations.trainer import projection_callback  # noqa: E402
from forgetcast.protect.projection import Projection  # noqa: E402
from forgetcast.protect.restraint import protect  # noqa: E402
from forgetcast.tuners.adapter import Adapter  # noqa: E402
from forgetcast.tuners.anatomy import Anatomy, Block  # noqa: E402


class Regression(nn.Module):
    """One adapted block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = x + self.block(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


def samples(seed: int, count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(12, generator=draw), "labels": torch.randn(12, generator=draw)} for _ in range(count)]


def old_outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**torch.utils.data.default_collate(samples(0, 5)))["logits"]


def test_old_outputs_stay_under_the_callback_and_move_without_it(tmp_path):
    torch.manual_seed(0)
    model = Regression()
    tuned = Adapter(rank=8).attach(model, Anatomy((Block("block", "block.0", "block.2"),)))
    nn.init.normal_(tuned.parameters()[1], std=0.1)
    old = torch.utils.data.default_collate(samples(0, 5))
    projection = Projection(tuned.sites(), threshold=1.0).after(model, [old], lambda found, batch: found(**batch))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )

    def train(callbacks: list[transformers.TrainerCallback]) -> float:
        before = old_outputs(model)
        transformers.Trainer(model=model, args=arguments, train_dataset=samples(1, 40), callbacks=callbacks).train()
        return float((old_outputs(model) - before).norm() / before.norm())

    start = {name: value.clone() for name, value in tuned.state().items()}
    assert train([projection_callback(projection)]) < 1e-5
    assert max(float((tuned.state()[name] - value).abs().max()) for name, value in start.items()) > 1e-2
    assert train([]) > 1e-2  # the callback's hooks are gone


class Failing(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
        raise RuntimeError("in the middle")


def test_training_that_raises_leaves_the_optimiser_as_it_was(tmp_path):
    model = Regression()
    tuned = Adapter(rank=8).attach(model, Anatomy((Block("block", "block.0", "block.2"),)))
    old = torch.utils.data.default_collate(samples(0, 5))
    projection = Projection(tuned.sites(), threshold=1.0).after(model, [old], lambda found, batch: found(**batch))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=samples(1, 8), callbacks=[projection_callback(projection), Failing()]
    )
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with protect(optimizer, projection):
        pass
