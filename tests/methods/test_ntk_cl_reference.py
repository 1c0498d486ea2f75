"""Stored reference numbers of NTK-CL's official code agree with the formulas that they follow, and with themselves."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from ntk_cl_drawn import as_stored, drawn, images
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize

FILE = Path(__file__).with_name("ntk_cl_reference.safetensors")
FEATURES = ("channel", "patch", "fused")
DATA_TERMS = 5  # all but the last one, the penalty
with safe_open(FILE, "pt") as stored:
    ABOUT = json.loads(stored.metadata()["about"])
NUMBERS = load_file(FILE)
EXACT = {name: value.double() for name, value in NUMBERS.items()}
every_case = pytest.mark.parametrize("case", ABOUT["cases"])
drawn_case = pytest.mark.parametrize("case", ["plain", "pretrained"])


def weight(name: str, *shape: int) -> torch.Tensor:
    return drawn(name, shape).double()


def features(case: str) -> list[torch.Tensor]:
    return [EXACT[f"{case}.features.{name}"] for name in FEATURES]


def known_prototypes(width: int) -> torch.Tensor:
    return weight("fc.weight", ABOUT["known_classes"], width)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= tolerance * (1 + theirs.abs())).all()


def test_the_file_is_small_and_says_what_it_holds():
    assert FILE.stat().st_size < 300_000
    needed = "source commit blobs torch dropout model cases weights images labels selected_rows few first terms"
    needed += " term_weights sgd test_multipliers sections trainable kept_tokens condensed implementation_defined"
    assert not set(needed.split()) - ABOUT.keys()
    assert set(ABOUT["implementation_defined"]["tensors"]) <= NUMBERS.keys()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in NUMBERS.values())


@pytest.mark.parametrize("case", ABOUT["cases"])
def test_every_trainable_parameter_has_a_gradient_and_two_steps(case):
    names = [name for name in ABOUT["trainable"] if case != "initial" or "fusion" not in name]
    for part in ("gradient", "step1", "step2"):
        assert {key for key in NUMBERS if key.startswith(f"{case}.{part}.")} == {f"{case}.{part}.{n}" for n in names}
    assert NUMBERS[f"{case}.gradient_norms"].shape == (len(ABOUT["terms"]), len(ABOUT["trainable"]))


@pytest.mark.parametrize(("name", "count"), ABOUT["images"].values())
def test_the_images_are_those_of_the_reference(name, count):
    made = images(name, count)
    assert made.shape == (count, 3, 224, 224)
    assert sha256(made.numpy().tobytes()).hexdigest() == ABOUT["images_sha256"][name]


def test_the_running_average_is_the_plain_mean():
    names = {name.removeprefix("average.2.") for name in NUMBERS if name.startswith("average.2.")}
    assert len(names) == 8
    for name in names:
        shape = NUMBERS[f"average.2.{name}"].shape
        ends = torch.stack([weight(f"task{task}.{name}", *shape) for task in range(3)])
        for task in range(3):
            close(EXACT[f"average.{task}.{name}"], ends[: task + 1].mean(0), 1e-6)


@every_case
def test_logits_at_test_are_weighted_cosines_of_the_sections(case):
    sections = ABOUT["sections"]["pretrained" if case == "pretrained" else "plain"]
    share = {"pretrained": "beta", "average": "gamma", "current": "alpha"}
    for name, given in zip(FEATURES, features(case), strict=True):
        prototypes = torch.cat((known_prototypes(given.shape[1]), EXACT[f"{case}.prototypes"]))
        pairs = zip(sections, given.chunk(len(sections), 1), prototypes.chunk(len(sections), 1), strict=True)
        logits = sum(ABOUT["test_multipliers"][share[s]] * normalize(z) @ normalize(p).T for s, z, p in pairs)
        close(logits, EXACT[f"{case}.test_logits.{name}"])


@every_case
def test_the_fused_feature_is_linear_in_the_other_two(case):
    channel, patch, fused = features(case)
    width = channel.shape[1]
    value = weight("fusion_model.value.weight", width, width), weight("fusion_model.value.bias", width)
    close(0.5 * (channel @ value[0].T + value[1]) + channel + 0.1 * patch, fused)


@every_case
def test_query_and_key_get_no_gradient_from_the_data(case):
    norms = dict(zip(ABOUT["trainable"], NUMBERS[f"{case}.gradient_norms"].T, strict=True))
    for name in ("query.weight", "query.bias", "key.weight", "key.bias"):
        assert not norms[f"fusion_model.{name}"][:DATA_TERMS].any()
    assert norms["fusion_model.value.weight"][:DATA_TERMS].any()


@every_case
@pytest.mark.parametrize("prototypes", ["", "few.", "first."])
def test_l_mi_is_minus_a_log_over_all_positives_and_a_mean_of_logsumexps(case, prototypes):
    rows = torch.tensor(ABOUT.get(prototypes[:-1], ABOUT)["selected_rows"], dtype=torch.long)
    fused = features(case)[2]
    together = normalize(torch.cat((fused, known_prototypes(fused.shape[1])[rows])))
    labels = [*ABOUT["labels"], *rows.tolist()]
    similar = (together @ together.T / 0.1).tolist()
    others = [[similar[i][j] for j in range(len(labels)) if j != i] for i in range(len(labels))]
    same = [similar[i][j] for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j and a == b]
    expected = torch.tensor(same).logsumexp(0) - torch.tensor(others).logsumexp(1).mean()
    close(EXACT[f"{case}.{prototypes}l_mi" if prototypes else f"{case}.terms.l_mi"], expected.double())


@every_case
def test_l_svd_is_the_signed_sum_outside_of_the_leading_directions(case):
    channel, patch, _ = (normalize(given) for given in features(case))
    unit = normalize(known_prototypes(channel.shape[1]))
    leading = torch.linalg.eigh(unit.T @ unit).eigenvectors[:, -ABOUT["svd_columns"] :]
    close((channel + patch - (channel + patch) @ leading @ leading.T).sum(), EXACT[f"{case}.terms.l_svd"])
    values = NUMBERS[f"{case}.singular_values"]
    assert values[ABOUT["svd_columns"] - 1] > 1.05 * values[ABOUT["svd_columns"]] > 0.1


@every_case
def test_cross_entropies_are_of_scaled_cosines_and_the_total_is_weighted(case):
    labels = torch.tensor(ABOUT["labels"]) - ABOUT["known_classes"]
    for name, given in zip(FEATURES, features(case), strict=True):
        proxies = weight("proxy_fc.weight", ABOUT["new_classes"], given.shape[1])
        logits = weight("proxy_fc.sigma", 1) * normalize(given) @ normalize(proxies).T
        close(logits, EXACT[f"{case}.logits.{name}"])
        close(cross_entropy(logits, labels), EXACT[f"{case}.terms.ce_{name}"])
    total = sum(share * EXACT[f"{case}.terms.{name}"] for name, share in ABOUT["term_weights"].items())
    close(total, EXACT[f"{case}.terms.total"])


@drawn_case
def test_the_penalty_and_the_first_step_follow_from_the_drawn_weights(case):
    width = len(ABOUT["sections"][case]) * ABOUT["model"]["width"]
    penalty = torch.zeros((), dtype=torch.float64)
    for name in ABOUT["trainable"]:
        fusion = name.startswith("fusion_model") and name.endswith("weight")
        first = EXACT[f"{case}.step1.{name}"]
        start = weight(name, *((width, width) if fusion else first.shape))
        gradient = EXACT[f"{case}.gradient.{name}"]
        decayed = gradient + ABOUT["sgd"]["weight_decay"] * as_stored(start, first)
        close(first, as_stored(start, first) - ABOUT["sgd"]["lr"] * decayed, 1e-6)
        if name.endswith("weight") and "proxy" not in name:
            drift = start - weight(f"reg_{name.removeprefix('backbone.')}", *start.shape)
            penalty += drift.square().sum()
            if "query" in name or "key" in name:
                close(gradient, as_stored(2 * ABOUT["term_weights"]["l_reg"] * drift, gradient), 1e-7)
    close(penalty, EXACT[f"{case}.terms.l_reg"])


def test_official_initial_patch_prompts_learn_only_the_bias_of_their_normalisation():
    for name in (name for name in ABOUT["trainable"] if "patch_prompt_list" in name):
        moves = name.endswith("norm.bias") and ".2." not in name  # prompts of the last block reach no class token
        assert NUMBERS[f"initial.gradient.{name}"].any() == moves
        assert NUMBERS[f"initial.step2.{name}"].any() == moves
