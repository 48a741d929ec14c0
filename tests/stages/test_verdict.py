"""What the loss curves of a run say: falling, flat, rising and noisy ones, of many points and of few."""

import math
import random

import pytest

from stages.train.verdict import of_curves

STEPS = 200


def curves(held_out, train, every=10, noise=0.01, seed=0):
    """Losses of a run of 200 steps. `held_out` and `train` are functions of the share of steps that are done.
    Single steps scatter by 10 %, held-out losses by `noise` nats.
    """
    chance = random.Random(seed)
    steps = [step for step in range(0, STEPS + 1, every) if step < STEPS] + [STEPS]
    losses = {step: held_out(step / STEPS) + chance.gauss(0, noise) for step in steps}
    kept = min(steps[1:], key=losses.__getitem__)
    trained = {s: train(s / STEPS) * math.exp(chance.gauss(0, 0.1)) for s in range(1, STEPS + 1)}
    return trained, losses, kept


def falling(x):
    return 1.2 + 0.8 * math.exp(-8 * x)


def rising(x):
    return 1.2 + 0.8 * math.exp(-12 * x) + 0.35 * max(0, x - 0.4)


def by_heart(x):
    return 0.2 + 1.8 * math.exp(-4 * x)


def exploding(x):
    return rising(x) + 2 * max(0, x - 0.4)


def steady(x):
    return 1.3


def slow(x):
    return 2 - 0.8 * x


def too_high(x):
    return 4.66 + 7 * math.exp(-8 * x)


SHAPES = [
    ("learnt", falling, falling),
    ("still_falling", slow, slow),
    ("overfitted", rising, by_heart),
    ("overfitted", steady, by_heart),
    ("flat", steady, steady),
    ("flat", too_high, too_high),
    ("diverged", exploding, exploding),
]


@pytest.mark.parametrize("every", [4, 10, 50])
@pytest.mark.parametrize(("name", "held_out", "train"), SHAPES)
def test_each_shape_has_its_verdict_however_often_it_is_measured(name, held_out, train, every):
    found = [of_curves(*curves(held_out, train, every, seed=seed)).name for seed in range(40)]
    assert found.count(name) >= 39


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_noise_alone_is_no_overfitting_and_no_learning(noise):
    for held_out, name in ((falling, "learnt"), (steady, "flat")):
        found = [of_curves(*curves(held_out, held_out, noise=noise, seed=seed)).name for seed in range(40)]
        assert found.count(name) >= 36


def test_a_small_rise_after_a_large_fall_is_no_overfitting():
    """After a fall of a whole nat, 0.0049 to 0.0052 is nothing."""
    train = dict.fromkeys(range(1, 301), 0.005)
    held_out = {0: 1.07, 50: 0.018, 100: 0.0058, 150: 0.0053, 200: 0.0049, 250: 0.0051, 300: 0.0052}
    assert of_curves(train, held_out, 200).name == "learnt"


def test_the_sentence_says_how_overfitting_was_seen():
    train = {step: 2.0 - step / 150 for step in range(1, 201)}
    result = of_curves(train, {0: 2.0, 30: 1.4, 60: 1.25, 90: 1.21, 120: 1.3, 150: 1.38, 200: 1.48}, 90)
    assert result.name == "overfitted" and "lower rank" in result.advice
    assert result.sentence == (
        "Overfitted: held-out loss was lowest at step 90 (1.21) and rose to 1.48 while the training loss went"
        " from 1.43 to 0.70."
    )
    assert result.as_json() == {"name": "overfitted", "says": f"{result.sentence} {result.advice}"}


@pytest.mark.parametrize(
    ("losses", "kept", "name"),
    [
        ({0: 2.0, 200: 1.4}, 200, "learnt"),  # one point cannot tell more, and the advice says so
        ({0: 2.0, 100: 1.2, 200: 1.5}, 100, "overfitted"),
        ({0: 2.0, 100: 1.6, 200: 1.2}, 200, "still_falling"),
        ({0: 2.0, 100: 1.25, 200: 1.2}, 200, "learnt"),
        ({0: 1.3, 100: 1.6, 200: 1.9}, 100, "overfitted"),  # never below the base
        ({0: 1.3, 200: 1.29}, 200, "flat"),
        ({0: 1.3, 200: 1.5}, 200, "diverged"),
    ],
)
def test_two_or_three_points_have_a_verdict(losses, kept, name):
    result = of_curves(dict.fromkeys(range(1, 201), 1.3), losses, kept)
    assert result.name == name and ("eval_every" in result.advice) == (name == "learnt" and len(losses) == 2)


def test_without_held_out_conversations_and_without_steps_nothing_is_claimed():
    train, _, _ = curves(falling, falling)
    unknown = of_curves(train, {}, STEPS)
    assert unknown.name == "no_held_out" and "eval_share" in unknown.advice
    assert of_curves({}, {0: 6.2}, 0).name == of_curves({}, {}, 0).name == "not_trained"


def test_a_rise_when_rounding_sets_in_is_no_overfitting():
    train = dict.fromkeys(range(1, 201), 1.2)
    losses = {0: 2.0, 50: 1.3, 100: 1.2, 150: 1.45, 200: 1.43}
    assert of_curves(train, losses, 200, rounded_from=100).name == "learnt"
    assert of_curves(train, losses, 100).name == "overfitted"
