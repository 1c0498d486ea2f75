"""APER: features of the backbone as it was beside those of the backbone as it is, and class means of both."""

import copy
import io

import numpy as np
import pytest
import torch
from digit_tasks import task_of
from small import stream
from torch import Tensor, nn
from tuned import Transformer

from forgetcast.heads.base import UNSEEN
from forgetcast.learn.cost import stored_numbers
from forgetcast.learn.loop import learn
from forgetcast.learn.optimizer import Optimization
from forgetcast.methods.aper import APER, Merged
from forgetcast.methods.ncm import SimpleCIL
from forgetcast.methods.registry import takes_steps
from forgetcast.tuners.adapter import Adapter
from forgetcast.tuners.lora import LoRA
from forgetcast.tuners.prefix import Prefix
from forgetcast.tuners.prompt import Prompt

WIDTH = 24
OPTIMIZATION = Optimization("sgd", learning_rate=0.1, epochs=1, batch_size=32, momentum=0.9)
TUNERS = {
    "adapter": Adapter(rank=16, activation="relu", scale=0.1, bias=True),
    "sequential adapter": Adapter(rank=16, place="sequential"),
    "lora": LoRA(rank=4, dropout=0.2),
    "prefix": Prefix(length=3),
    "prompt": Prompt(length=3),
    "all": None,
}
every_tuner = pytest.mark.parametrize("name", TUNERS)


class ViT(nn.Module):
    """Of transformers, on digits as images of one colour; its feature is the class token."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(3)
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
        self.model = transformers.ViTModel(config, add_pooling_layer=False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.view(-1, 1, 8, 8)).last_hidden_state[:, 0]


def backbone(name: str) -> nn.Module:
    made = ViT()
    if TUNERS[name] is not None:
        if name == "lora":
            pytest.importorskip("peft")
        torch.manual_seed(6)
        TUNERS[name].attach(made.model)
    return made


def questions() -> Tensor:
    return torch.from_numpy(stream().source.inputs[np.concatenate([task.test for task in stream().tasks])])


def unlearnt(method) -> None:
    """All tasks without a step."""
    for index in range(3):
        method.begin_task(task_of(index))
        method.end_task(task_of(index))


@every_tuner
def test_features_are_the_pretrained_ones_beside_the_adapted_ones(name):
    method = APER(backbone(name), WIDTH)
    pretrained = ViT()(questions()).detach()
    method.model.eval()
    with torch.no_grad():
        before = method.model.features(questions())
        for parameter in method.extractor.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        after, adapted = method.model.features(questions()), method.extractor(questions())
    assert torch.equal(before, torch.cat([pretrained, pretrained], 1))
    assert torch.equal(after, torch.cat([pretrained, adapted], 1))
    assert float((adapted - pretrained).norm() / pretrained.norm()) > 1e-3


@every_tuner
def test_the_session_is_that_of_every_closed_form_and_then_nothing_trains(name):
    ours, theirs = backbone(name), backbone(name)
    start = {key: value.clone() for key, value in ours.state_dict().items()}
    method = APER(ours, WIDTH)
    done = learn(method, stream(), OPTIMIZATION, seed=2, until=2)
    learn(SimpleCIL(theirs, WIDTH, first_session=True), stream(), OPTIMIZATION, seed=2, until=1)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    moved = sum(value.numel() for key, value in ours.state_dict().items() if not torch.equal(value, start[key]))
    assert done.trainable_parameters == [moved + 2 * (WIDTH + 1), 0]
    assert not any(value.requires_grad for value in method.model.parameters())
    assert torch.equal(method.model.eval().features(questions())[:, :WIDTH], ViT()(questions()))


def test_answers_are_cosines_to_means_of_both_features():
    method = APER(backbone("adapter"), WIDTH)
    learn(method, stream(), OPTIMIZATION, seed=2)
    plain, adapted = ViT().double(), copy.deepcopy(method.extractor).double()

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)

    with torch.no_grad():
        rows = [(batch.inputs.double(), batch.labels) for index in range(3) for batch in task_of(index).batches()]
        inputs, labels = (torch.cat(column) for column in zip(*rows, strict=True))
        phi = torch.cat([plain(inputs), adapted(inputs)], 1)
        means = torch.stack([phi[labels == label].mean(0) for label in range(6)])
        both = torch.cat([plain(questions().double()), adapted(questions().double())], 1)
    torch.testing.assert_close(method.predict(questions()), unit(both) @ unit(means).T, rtol=0, atol=1e-5)


@every_tuner
def test_without_steps_it_is_the_nearest_mean_of_the_pretrained_backbone(name):
    method, plain = APER(backbone(name), WIDTH), SimpleCIL(ViT(), WIDTH)
    for each in (method, plain):
        unlearnt(each)
    torch.testing.assert_close(method.predict(questions()), plain.predict(questions()), rtol=0, atol=1e-6)


def test_during_the_first_task_it_answers_by_the_head_of_the_session():
    method = APER(backbone("adapter"), WIDTH)
    method.begin_task(task_of(0))
    assert method.predict(questions()).shape == (len(questions()), 2)
    method.end_task(task_of(0))
    method.begin_task(task_of(1))
    assert (method.predict(questions())[:, 2:] == UNSEEN).all()
    with pytest.raises(ValueError, match="gradient step"):
        method.loss(next(iter(task_of(1).batches())))
    assert takes_steps("aper", {})
    assert [method.takes_steps(index) for index in range(2)] == [True, False]


@pytest.mark.parametrize("ended", [False, True])
def test_resumed_in_the_session_and_after_it(ended):
    method, task = APER(backbone("lora"), WIDTH), task_of(0)
    method.begin_task(task)
    optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.1)
    for batch in task.batches():
        optimizer.zero_grad()
        method.loss(batch).backward()
        optimizer.step()
    if ended:
        method.end_task(task)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    fresh = APER(backbone("lora"), WIDTH)
    with torch.no_grad():  # what the fresh one was made with is not what counts
        for value in fresh.model.backbone.start:
            value.add_(1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for each in (method, fresh):
        if not ended:
            each.end_task(task)
        each.begin_task(task_of(1))
        each.end_task(task_of(1))
    assert torch.equal(fresh.predict(questions()), method.predict(questions()))
    assert torch.equal(fresh.model.features(questions())[:, :WIDTH], ViT()(questions()))


def test_it_keeps_a_copy_of_what_trains_and_of_nothing_else():
    part = backbone("adapter")
    training = sum(value.numel() for value in part.parameters() if value.requires_grad)
    whole = sum(value.numel() for value in part.state_dict().values())
    method = APER(part, WIDTH)
    unlearnt(method)
    assert stored_numbers(method.state_dict()) == whole + training + 6 * (2 * WIDTH + 1) + 1


def test_running_statistics_are_part_of_how_it_was():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    x = torch.randn(8, 6)
    before = copy.deepcopy(made).eval()(x)
    merged = Merged(made)
    for _ in range(3):
        made.train()(x + 1)
    found = merged.eval()(x)
    assert torch.equal(found[:, :5], before)
    assert torch.equal(found[:, 5:], made(x))
    assert not torch.allclose(made(x), before)


def test_texts_with_padding():
    transformers = pytest.importorskip("transformers")
    from forgetcast.backbones.huggingface import Pooled

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, pad_token_id=0)
    plain = Pooled(transformers.BertModel(config, add_pooling_layer=False).eval(), "mean")
    tuned = copy.deepcopy(plain)
    TUNERS["adapter"].attach(tuned.model)
    merged = Merged(tuned)
    for name, value in tuned.named_parameters():
        if "adapter" in name:
            nn.init.normal_(value, std=0.3)
    lengths = torch.tensor([2, 6, 4])
    mask = (torch.arange(6) < lengths[:, None]).long()
    texts = torch.stack([torch.randint(1, 50, (3, 6)) * mask, mask], 1)
    found = merged.eval()(texts)
    assert torch.equal(found[:, :WIDTH], plain(texts))
    assert not torch.allclose(found[:, WIDTH:], plain(texts))
    alone = torch.cat([merged(texts[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


def test_what_cannot_be_adapted_or_is_changed_already_is_refused():
    with pytest.raises(ValueError, match="APER on a backbone of which nothing trains.*Add a tuner"):
        APER(Transformer(WIDTH).requires_grad_(False), WIDTH)
    for tuner in (Prefix(gated=False), Prompt(gated=False), Prompt(gated=False, depth="shallow")):
        made = ViT()
        tuner.attach(made.model)
        with pytest.raises(ValueError, match="tokens without gates at model.*Set gated=True"):
            APER(made, WIDTH)
