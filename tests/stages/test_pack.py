"""Packing: conversations laid end to end, none lost, none cut, little room left."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the train environment")

from stages.train import loop  # noqa: E402
from stages.train.pack import Order, best_fit, layouts, packs, share, spread, trained_tokens, unfilled  # noqa: E402
from stages.train.ranks import Ranks  # noqa: E402


def numbered(rows):
    return [{**row, "number": number} for number, row in enumerate(rows)]


def test_best_fit_puts_each_length_where_least_room_is_left():
    assert best_fit([5, 7, 3, 2, 8], 10) == [[4, 3], [1, 2], [0]]
    with pytest.raises(ValueError, match="row 1 has 11 tokens, a packed sequence 10"):
        best_fit([3, 11], 10)


def test_every_row_is_in_one_sequence_once_and_none_is_over_full():
    chance = random.Random(0)
    lengths = [chance.randint(1, 900) for _ in range(500)]
    groups = best_fit(lengths, 1024)
    assert sorted(i for group in groups for i in group) == list(range(500))
    assert max(sum(lengths[i] for i in group) for group in groups) <= 1024
    assert len(groups) <= 1.05 * sum(lengths) / 1024 + 1


def test_a_packed_sequence_is_its_rows_end_to_end():
    rows = numbered([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}, {"input_ids": [6], "labels": [-100]}])
    first, second = packs(rows, 4)
    assert first.ids.tolist() == [1, 2, 3, 6] and first.labels.tolist() == [-100, 2, 3, -100] and first.documents.lengths == (3, 1)
    assert (first.rows, second.rows) == ((0, 2), (1,))
    assert second.ids.tolist() == [4, 5] and second.documents.spans == [(0, 2)]
    assert first.documents.offsets("cpu").tolist() == [0, 3, 4] and first.documents.index("cpu").tolist() == [0, 0, 0, 1]


def test_a_label_on_a_documents_first_token_is_trained_by_nothing_whatever_stands_before_it():
    rows = numbered([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [4, 5], "labels": [4, 5]}])
    assert packs(rows, 4)[0].labels.tolist() == [-100, 2, -100, 5] and trained_tokens(rows) == 2


def test_ranks_have_about_as_many_tokens_and_every_row_once():
    rows = [{"input_ids": [0] * length} for length in (9, 8, 3, 3, 2, 1)]
    shares = spread(rows, 2)
    assert sorted(len(row["input_ids"]) for share in shares for row in share) == [1, 2, 3, 3, 8, 9]
    assert [sum(len(row["input_ids"]) for row in share) for share in shares] == [13, 13]
    assert spread(rows[:1], 2)[1] == []


def test_the_order_of_rows_follows_from_seed_and_place_alone():
    order = Order(10, 7)
    steps = [order.step(number, 4) for number in range(5)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert Order(10, 7).step(3, 4) == steps[3] and Order(10, 8).step(3, 4) != steps[3]


def test_little_room_is_left_on_the_sample_conversations():
    """Under 5 % of the packed sequences of real steps, with words for tokens: what is not filled is not computed either."""
    folder = Path(__file__).parents[2] / "data" / "sample" / "conversations"
    lengths = [len(json.dumps(json.loads(line)["messages"]).split()) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    assert len(lengths) > 300 and unfilled(lengths, 7, 64, 8 * max(lengths), 20) < 0.05


@pytest.mark.parametrize("count", [1, 2])
def test_the_layout_of_packs_follows_from_the_lengths_alone(count):
    """CUDA graphs are captured before the first step, for exactly the packs that will come."""
    numbers = random.Random(2)
    lengths = [numbers.randint(1, 90) for _ in range(9)]
    rows = [{"input_ids": [1] * length, "labels": [1] * length, "number": n} for n, length in enumerate(lengths)]
    for rank in range(count):
        assert layouts(lengths, rank, count, 100) == [pack.documents for pack in share(rows, rank, count, 100, level=False)]


def test_graphs_are_captured_for_the_packs_of_the_steps_that_are_left(monkeypatch):
    lengths = [5, 60, 33, 90, 12, 71, 8]
    rows = [{"input_ids": [1] * length, "labels": [1] * length, "number": n} for n, length in enumerate(lengths)]
    order, asked = Order(len(rows), 7), []
    captured = SimpleNamespace(prepare=lambda packs, progress: (asked.extend(packs), progress(1, 2)))
    said = []
    monkeypatch.setattr(loop.assemble, "capture", lambda model: captured)
    monkeypatch.setattr(loop.job, "progress", lambda done, total, unit="", note="": said.append((done, total, note)))
    params = {"steps": 6, "batch": 3, "sequence_tokens": 100}
    loop.Loop.capture(SimpleNamespace(rows=rows, order=order, start=2, ranks=Ranks(), model=None, task=SimpleNamespace(params=params)))
    wanted = {pack.documents for step in range(2, 6) for pack in share([rows[row] for row in order.step(step, 3)], 0, 1, 100, level=False)}
    assert set(asked) == wanted and len(asked) == len(wanted)
    assert said == [(1, 2, "capturing CUDA graphs")]
