"""The lengths that the benches draw: as they are written down, the same for every row, and the sample's as
the data has them.
"""

import random

import pytest

from bench import lengths
from model.labels import IGNORED

WITHIN = {
    "equal": (2048, 2048),
    "mixed": (650, 1400),
    "voice": (150, 400),
    "long": (200, 16384),
    "sample": (1, 2048),
}


@pytest.mark.parametrize("kind", lengths.LENGTHS)
def test_a_step_has_eight_conversations_of_the_lengths_that_are_written_down(kind):
    low, high = WITHIN[kind]
    steps = lengths.plan(kind, 200)
    flat = [length for step in steps for length in step]
    assert {len(step) for step in steps} == {8} and low <= min(flat) and max(flat) <= high
    assert kind == "equal" or len(set(steps)) == 200, "lengths are drawn anew for every step"
    assert kind not in ("mixed", "voice") or max(flat) - min(flat) > 0.95 * (high - low)


def test_long_conversations_are_few_and_have_most_of_the_tokens():
    flat = sorted(length for step in lengths.plan("long", 500) for length in step)
    assert flat[len(flat) // 2] < 400 and flat[-1] == 16384
    assert sum(length for length in flat if length > 1000) > sum(flat) / 2


def test_a_packed_step_has_no_room_for_the_next_conversation():
    for step in lengths.plan("voice-packed", 20):
        assert 16384 - 400 < sum(step) <= 16384 and min(step) >= 150 and max(step) <= 400


def test_every_row_is_given_the_same_lengths_and_a_longer_run_begins_with_them():
    assert lengths.plan("mixed", 3, 2) == lengths.plan("mixed", 5, 2)[:3] != lengths.plan("voice", 3, 2)


def test_a_misspelt_distribution_is_refused():
    assert lengths.kinds("mixed,voice-packed") == ["mixed", "voice-packed"]
    with pytest.raises(
        ValueError, match="--lengths vioce: there are equal, mixed, voice, long, sample, voice-packed"
    ):
        lengths.kinds("mixed,vioce")


def test_the_last_quarter_of_a_conversation_is_trained_and_a_first_token_never():
    first, second, alone = lengths.conversations((8, 3, 1), 100, 0)
    assert (first.labels == IGNORED).tolist() == [True] * 6 + [False] * 2 and first.labels[
        6:
    ].tolist() == first.ids[6:].tolist()
    assert (second.labels == IGNORED).tolist() == [True, True, False] and alone.labels.tolist() == [IGNORED]
    assert [its.trained for its in (first, second, alone)] == [2, 1, 0]


def test_the_samples_lengths_are_those_that_stage_data_counts():
    pytest.importorskip("transformers", reason="needs the train environment")
    assert list(lengths.sample()) == lengths.count_sample(), (
        "data/sample or its tokenizer changed: run python -m bench.lengths"
    )
    assert lengths.LENGTHS["sample"](random.Random(0)) in lengths.sample()
