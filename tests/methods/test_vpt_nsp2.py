"""VPT-NSP^2 through whole transformers: its steps are the paper's, old features stay where its conditions are exact."""

import io
from functools import cache

import pytest
import torch
from small_runs import check_rows
from test_inflora import KINDS, SIZES, TEXT, WIDTH, copied, pretrained, read, stream, task_of, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

import transformers

from forgetcast.backbones.huggingface import as_backbone
from forgetcast.heads.linear import Linear
from forgetcast.methods.base import Batch, Model, TaskData
from forgetcast.methods.registry import create
from forgetcast.methods.vpt_nsp2 import VPTNSP2
from forgetcast.modes import evaluating
from forgetcast.protect.distribution import TokenDistribution
from forgetcast.tuners.deep import PromptPart

EXACT = {"threshold": 1.0, "strength": 1.0, "length": 32, "distribution": None}


def method(kind: str = "vit", **options) -> VPTNSP2:
    backbone = pretrained(kind)
    return VPTNSP2(Model(backbone, Linear(WIDTH)), **{"temperature": 1.0} | options)


def parts(made: VPTNSP2) -> list[PromptPart]:
    return [part for part in made.model.modules() if isinstance(part, PromptPart)]


def learnt(made: VPTNSP2, tasks: int, kind: str = "vit", epochs: int = 3) -> VPTNSP2:
    for index in range(tasks):
        task = task_of(stream(kind), index)
        made.begin_task(task)
        train(made, task, epochs)
        made.end_task(task)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_trains_moves_and_no_other_bit(kind):
    made = method(kind, temperature=28.0)
    for index in range(3):
        task = task_of(stream(kind), index)
        made.begin_task(task)
        before = copied(made.model)
        train(made, task)
        after = copied(made.model)
        training = {name for name, value in made.model.named_parameters() if value.requires_grad}
        assert {name for name in after if not torch.equal(after[name], before[name])} == training
        prompts = {name for name in training if name.endswith(".prompt.embedding.weight")}
        assert len(prompts) == 2
        assert training - prompts == {"head.weight", "head.bias"}
        old = [output for output in task.seen if output not in task.classes]
        assert torch.equal(after["head.weight"][old], before["head.weight"][old])
        made.end_task(task)
        assert all(torch.equal(value, after[name]) for name, value in copied(made.model).items())


def test_prompts_begin_as_in_the_code():
    for part in parts(method(length=200)):
        tokens = part.embedding.weight.detach()
        assert part.gate is None
        assert tokens.abs().max() <= 1
        assert tokens.std().item() == pytest.approx(3**-0.5, rel=0.05)


def one_sample(kind: str) -> TaskData:
    """A first task that leaves directions free in every space."""
    inputs, labels = read(stream(kind), 0)
    batch = Batch(inputs[:1], labels[:1], labels[:1])
    return TaskData(0, (0, 1), (0, 1), lambda: iter([batch]))


def features(made: VPTNSP2, inputs: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(made.model):
        return made.model.features(inputs)


def moved(made: VPTNSP2, kind: str, rate: float = 0.05) -> list[float]:
    """How far old features, old logits, new features and the prompts move in steps on a new task, relatively."""
    task = one_sample(kind)
    (old,) = task.batches()
    made.begin_task(task)
    train(made, task, 4)
    made.end_task(task)
    new = read(stream(kind), 1)[0]
    before, logits, elsewhere = features(made, old.inputs), made.predict(old.inputs).detach(), features(made, new)
    start = torch.cat([part.embedding.weight.detach().clone() for part in parts(made)])
    task = task_of(stream(kind), 1)
    made.begin_task(task)
    optimizer = torch.optim.AdamW(made.parameter_groups(), lr=rate, weight_decay=0.1)
    for batch in [*task.batches()] * 4:
        optimizer.zero_grad()
        made.loss(batch).backward()
        made.after_backward()
        optimizer.step()
        made.after_step()
    ends = torch.cat([part.embedding.weight.detach() for part in parts(made)])
    pairs = [
        (features(made, old.inputs), before),
        (made.predict(old.inputs).detach()[:, :2], logits),
        (features(made, new), elsewhere),
        (ends, start),
    ]
    return [float((now - then).norm() / then.norm()) for now, then in pairs]


CASES = [("vit", "projector", 0.05), ("vit", "normalised", 3.0), ("bert", "projector", 0.3)]


@pytest.mark.filterwarnings("ignore:.*of their directions free")
@pytest.mark.parametrize(("kind", "blend", "rate"), CASES)
def test_old_features_stay_where_the_conditions_are_exact(kind, blend, rate):
    """All directions of a sample, and spreads kept: to 1e-5 in single precision, where new features move."""
    old, logits, new, prompts = moved(method(kind, **EXACT, blend=blend), kind, rate)
    assert max(old, logits) < 1e-5
    assert new > 100 * old
    assert prompts > 1e-2


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_what_each_part_of_it_is_for():
    """Spreads kept, a term for them, none; no projection: old features move more from each to the next."""
    exact = EXACT | {"blend": "projector"}
    far = [moved(method(**exact | {"distribution": one}), "vit")[0] for one in (None, 10.0, 0.0)]
    far.append(moved(method(**exact | {"strength": 0.0, "distribution": 0.0}), "vit")[0])
    assert far[0] < 1e-5 < far[1] < far[2] < 0.5 * far[3]
    # where blocks normalise behind attention there is nothing for a term to do
    assert moved(method("bert", **exact | {"distribution": 1.0}), "bert")[0] < 1e-5


def rows_of(made: VPTNSP2, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of every block of a ViT, from its weights: C gamma W_k^T q and S / sigma of all heads and tokens, dense."""
    found = []
    for part, layer in zip(parts(made), made.model.backbone.model.layers, strict=True):
        attention, norm = layer.attention, layer.layernorm_before
        held: list[Tensor] = []
        handle = norm.register_forward_hook(lambda _, given, __, held=held: held.append(given[0].detach()))
        features(made, inputs)
        handle.remove()
        prompts = part.embedding.weight.detach()
        heads = 2
        x = norm(held[0]).detach()
        q, k = (getattr(attention, name)(x).detach() for name in ("q_proj", "k_proj"))
        p = attention.k_proj(norm(prompts)).detach()
        affinity, shares = [], []
        spread = (prompts.var(1, correction=0) + norm.eps).sqrt()
        for h, columns in enumerate(torch.arange(WIDTH).chunk(heads)):
            assert len(columns) == WIDTH // heads, h
            weight = attention.k_proj.weight.detach()[columns]
            affinity.append((q[..., columns] @ weight * norm.weight.detach()).flatten(0, 1))
            keys = torch.cat([p[None, :, columns].expand(len(x), -1, -1), k[..., columns]], 1)
            logits = q[..., columns] @ keys.mT / (WIDTH // heads) ** 0.5
            shares.append((logits.softmax(2)[..., : len(prompts)] / spread).flatten(0, 1))
        rows = torch.cat(affinity)
        found.append((rows - rows.mean(1, keepdim=True), torch.cat(shares)))
    return found


def blended(moments: Tensor, eta: float) -> Tensor:
    """Algorithm 2, dense: the null space of the summed moments up to the bend of their spectrum."""
    _, values, rows = torch.linalg.svd(moments)
    turns = [float(values[j - 1] - 2 * values[j] + values[j + 1]) for j in range(1, len(values) - 1)]
    null = rows[turns.index(max(turns)) + 1 :]
    projector = null.T @ null
    return eta * projector / projector.norm() + (1 - eta) * torch.eye(len(values), dtype=values.dtype)


@pytest.mark.parametrize("eta", [1.0, 0.97, 0.5])
def test_a_step_is_that_of_a_dense_projector_in_double_precision(eta):
    made = method(strength=eta, length=6, distribution=0.5)
    made.model.double()
    sums = [torch.zeros(size, size, dtype=torch.float64) for _ in range(2) for size in (WIDTH, 6)]
    for index in range(2):
        inputs, labels = read(stream("vit"), index)
        plain = task_of(stream("vit"), index)
        whole = Batch(inputs.double(), labels, labels)
        task = TaskData(index, plain.classes, plain.seen, lambda whole=whole: iter([whole]))
        made.begin_task(task)
        train(made, task, 2)
        made.end_task(task)
        rows = [side for pair in rows_of(made, inputs.double()) for side in pair]
        sums = [total + side.T @ side for total, side in zip(sums, rows, strict=True)]
    inputs, labels = read(stream("vit"), 2)
    made.begin_task(task_of(stream("vit"), 2))
    before = [part.embedding.weight.detach().clone() for part in parts(made)]
    nn.init.normal_(made.model.head.weight)
    optimizer = torch.optim.SGD(made.parameter_groups(), lr=0.1)
    made.loss(Batch(inputs.double(), labels, labels)).backward()
    made.after_backward()
    steps = [-0.1 * part.embedding.weight.grad for part in parts(made)]
    optimizer.step()
    made.after_step()
    for part, start, step, right, left in zip(parts(made), before, steps, sums[::2], sums[1::2], strict=True):
        expected = blended(left, eta) @ step @ blended(right, eta)
        found = part.embedding.weight.detach() - start
        assert step.norm() > 1e-4
        torch.testing.assert_close(found, expected, atol=1e-6 * float(step.norm()), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*of their directions free")
def test_the_bend_leaves_room_where_a_share_of_the_energy_leaves_none():
    tables = {}
    for threshold in (None, 0.5, 1.0):
        made = method(threshold=threshold, strength=1.0, blend="projector")
        for index in range(3):
            task = task_of(stream("vit"), index)
            made.begin_task(task)
            made.end_task(task)
        tables[threshold] = made.protections[0].table(made.model)
    assert (tables[None]["free"] >= 2).all()
    assert (tables[None]["rank"] >= 1).all()
    assert (tables[0.5]["free"] > tables[1.0]["free"]).all()
    assert (tables[1.0]["free"] == 1 - tables[1.0]["space"].str.endswith("shares")).all()  # C takes one off


def test_the_loss_is_over_the_outputs_of_the_task_with_a_temperature():
    made = learnt(method(temperature=5.0, distribution=3.0), 1)
    task = task_of(stream("vit"), 1)
    made.begin_task(task)
    nn.init.normal_(made.model.head.weight, generator=torch.Generator().manual_seed(0))
    (batch, *_) = task.batches()
    logits = made.model(batch.inputs)[:, list(task.classes)] / 5
    plain = cross_entropy(logits, batch.labels - 2)
    assert made.loss(batch).item() == pytest.approx(plain.item())
    with torch.no_grad():
        for part in parts(made):
            part.embedding.weight.mul_(1.5)
    term = made.protections[1].loss(made.model, batch, logits).item()
    assert term > 0.1
    logits = made.model(batch.inputs)[:, list(task.classes)] / 5
    assert made.loss(batch).item() == pytest.approx(cross_entropy(logits, batch.labels - 2).item() + term)
    assert made.plain_outputs() is None
    assert learnt(method(), 1).plain_outputs() == (0, 1)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_run_resumed_within_a_task_is_the_whole_run(kind):
    whole, task = learnt(method(kind), 1, kind), task_of(stream(kind), 1)
    whole.begin_task(task)
    train(whole, task, 1)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    torch.manual_seed(77)
    resumed = method(kind)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for made in (whole, resumed):
        train(made, task, 2)
        made.end_task(task)
    ours, theirs = copied(whole.model), copied(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, its in zip(whole.protections[0].bases.values(), resumed.protections[0].bases.values(), strict=True):
        assert torch.equal(mine, its)


@cache
def finished(kind: str) -> VPTNSP2:
    return learnt(method(kind), 2, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_an_answer_is_of_its_own_input(kind):
    check_rows(finished(kind), stream(kind))


def test_what_holds_it_together_is_what_it_says():
    assert [type(one).__name__ for one in method().protections] == ["NullSpace", "TokenDistribution", "StandingRows"]
    kinds = [type(one) for one in method(distribution=None, head="free").protections]
    assert TokenDistribution not in kinds
    assert len(kinds) == 1
    assert [part.embedding.weight.shape[0] for part in parts(method(layers=(1,), length=7))] == [7]


def test_grouped_queries_behind_a_pooling_are_understood():
    sizes = SIZES | {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    backbone = as_backbone(transformers.LlamaModel(transformers.LlamaConfig(**sizes, **TEXT)))
    made = create("vpt_nsp2", backbone, 48)
    assert [(part.heads, part.width) for part in parts(made)] == [(2, 12)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2}, "length=2 without a threshold; expected at least 3"),
        ({"length": 0}, "length=0"),
        ({"strength": 1.1}, "strength=1.1"),
        ({"blend": "half"}, "blend='half'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"energy": "sigma"}, "energy='sigma'"),
        ({"distribution": -1.0}, "distribution=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"layers": (5,)}, "layers=.5. for a model of 2 blocks"),
        ({"head": "projected"}, "head='projected'; expected one of"),
        ({"loss_outputs": "all"}, "loss_outputs='all'"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        create("vpt_nsp2", pretrained("vit"), WIDTH, **options)


def test_two_prompts_will_do_with_a_threshold_and_another_tuner_will_not():
    made = method(length=2, threshold=0.5)
    with pytest.raises(ValueError, match="a model with a tuner in place"):
        VPTNSP2(made.model)
