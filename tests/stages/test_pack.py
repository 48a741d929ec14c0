"""Packing: conversations laid end to end, none lost, none cut, little room left."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import operations as bench
from bench.lengths import LENGTHS
from model.families.nemotron_h import operations
from stages.train import loop
from stages.train.balance import spread
from stages.train.pack import (
    IDLE,
    Order,
    best_fit,
    packs,
    rank_layouts,
    rank_packs,
    trained_tokens,
    unfilled_share,
)
from stages.train.ranks import Ranks

NANO = operations.count(bench.sizes(52), recomputed=True)


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
    rows = numbered(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
            {"input_ids": [4, 5], "labels": [-100, 5]},
            {"input_ids": [6], "labels": [-100]},
        ]
    )
    first, second = packs(rows, 4)
    assert (
        first.ids.tolist() == [1, 2, 3, 6]
        and first.labels.tolist() == [-100, 2, 3, -100]
        and first.documents.lengths == (3, 1)
    )
    assert (first.rows, second.rows) == ((0, 2), (1,))
    assert second.ids.tolist() == [4, 5] and second.documents.spans == [(0, 2)]
    assert first.documents.offsets("cpu").tolist() == [0, 3, 4] and first.documents.index("cpu").tolist() == [
        0,
        0,
        0,
        1,
    ]


@pytest.mark.trap("packing-leaks")
def test_a_label_on_a_documents_first_token_is_trained_by_nothing_whatever_stands_before_it():
    rows = numbered([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [4, 5], "labels": [4, 5]}])
    assert packs(rows, 4)[0].labels.tolist() == [-100, 2, -100, 5] and trained_tokens(rows) == 2


def test_every_document_is_in_one_share_once():
    assert spread([9, 8, 3, 3, 2, 1], 2) == [[0, 3, 5], [1, 2, 4]]
    assert spread([7], 2) == [[0], []] and spread([], 2) == [[], []]


def test_documents_change_places_where_the_longest_first_leaves_one_share_too_expensive():
    """Longest first alone ends at 5 + 3 + 3 = 11, with 8 in the two other shares."""
    costs = [5, 5, 4, 4, 3, 3, 3]
    shares = spread(costs, 3)
    assert sorted(index for indices in shares for index in indices) == list(range(7))
    assert [sum(costs[index] for index in indices) for indices in shares] == [9, 9, 9]


def conversation(length, trained):
    return {"input_ids": [0] * length, "labels": [-100] * (length - trained) + [0] * trained, "number": 0}


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("kind", ["mixed", "voice", "long"])
def test_no_rank_computes_five_percent_more_than_the_mean_where_the_lengths_allow_it(kind, count):
    """For the real model. Some share has the largest document, and one has two of the `count` + 1 largest."""
    for seed in range(20):
        chance = random.Random(seed)
        lengths = [LENGTHS[kind](chance) for _ in range(8 * count)]
        rows = [conversation(length, chance.randint(1, length - 1)) for length in lengths]
        shares = [rank_packs(rows, rank, count, 16384, False, NANO) for rank in range(count)]
        found = [sum(documents_cost(pack) for pack in packed) for packed in shares]
        costs = sorted((NANO.of(len(row["input_ids"]), trained_tokens([row])) for row in rows), reverse=True)
        assert sum(found) == sum(costs), "a document is lost, or computed twice"
        assert max(found) <= max(1.05 * sum(costs) / count, costs[0], costs[count - 1] + costs[count])


def documents_cost(pack):
    labels = pack.labels.split(pack.documents.lengths)
    return sum(NANO.of(len(own), int((own != -100).sum())) for own in labels)


def test_a_balance_of_tokens_alone_would_let_a_rank_wait():
    """A document of 16,384 tokens costs over 15 % more than 16 of 1,024; a trained token costs more."""
    assert NANO.of(16384, 4096) > 1.15 * 16 * NANO.of(1024, 256)
    assert NANO.of(1024, 1000) > 1.05 * NANO.of(1024, 100)
    rows = [conversation(16384, 4096), *(conversation(1024, 256) for _ in range(48))]
    first, second = (rank_packs(rows, rank, 2, 16384, False, NANO) for rank in range(2))
    tokens = [sum(len(pack.ids) for pack in packed) for packed in (first, second)]
    assert abs(tokens[0] - tokens[1]) > 1024, "the rank with the long document has fewer tokens"


def test_ranks_have_as_many_trained_tokens_where_documents_are_of_one_length():
    rows = [conversation(1000, trained) for trained in (900, 100, 900, 100)]
    assert [trained_tokens_of(rank_packs(rows, rank, 2, 16384, False, NANO)) for rank in range(2)] == [
        1000,
        1000,
    ]


def trained_tokens_of(packed):
    return sum(int((pack.labels != -100).sum()) for pack in packed)


def test_with_a_sharded_base_every_rank_has_as_many_sequences():
    rows = [conversation(length, 5) for length in (90, 20, 20, 20, 20, 20)]
    shares = [rank_packs(rows, rank, 2, 100, True, NANO) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    alone = [rank_packs(rows[:1], rank, 2, 100, True, NANO) for rank in range(2)]
    assert alone[1] == [IDLE] and alone[0][0].documents.lengths == (90,)


def test_the_order_of_rows_follows_from_seed_and_place_alone():
    order = Order([1] * 10, 7, batch=4)
    steps = [order.step(number) for number in range(5)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert Order([1] * 10, 7, batch=4).step(3) == steps[3] and Order([1] * 10, 8, batch=4).step(3) != steps[3]


def test_a_step_takes_rows_of_the_same_order_while_their_tokens_fit():
    chance = random.Random(3)
    lengths = [chance.randint(150, 400) for _ in range(100)]
    order, by_rows = Order(lengths, 7, batch=8, batch_tokens=2000), Order(lengths, 7, batch=100)
    steps = [order.step(number) for number in range(60)]
    flat = [row for step in steps for row in step]
    assert len(flat) > 300 and flat[:300] == [row for number in range(3) for row in by_rows.step(number)]
    for step, following in itertools.pairwise(steps):
        tokens = sum(lengths[row] for row in step)
        assert tokens <= 2000 < tokens + lengths[following[0]]


def test_steps_of_tokens_are_the_same_when_a_run_is_resumed():
    chance = random.Random(3)
    lengths = [chance.randint(150, 400) for _ in range(30)]
    whole = [Order(lengths, 7, 8, 2000).step(number) for number in (41, 42)]
    order = Order(lengths, 7, 8, 2000)
    assert [order.step(number) for number in range(43)][41:] == whole
    assert order.step(3) == Order(lengths, 7, 8, 2000).step(3), "an earlier step after a later one"


def test_steps_of_tokens_have_one_row_at_least_and_reach_over_the_end_of_an_epoch():
    assert [len(Order([10, 10, 10], 0, 8, 25).step(number)) for number in range(4)] == [2, 2, 2, 2]
    assert sorted(Order([10, 10, 10], 0, 8, 30).step(5)) == [0, 1, 2]
    assert [Order([40], 0, 8, 25).step(number) for number in range(2)] == [[0], [0]]


def test_the_beginnings_of_steps_of_tokens_are_found_once(monkeypatch):
    """Else a late step of a long run would cost all steps before it, every time."""
    order, looked = Order([300] * 1000, 7, 8, 3000), []
    found = Order._end
    monkeypatch.setattr(Order, "_end", lambda self, start: (looked.append(start), found(self, start))[1])
    for number in (500, 400, 499, 501):
        order.step(number)
    assert len(looked) == len(set(looked)) == 502


def test_little_room_is_left_on_the_sample_conversations():
    """Under 5 % of the packed sequences of real steps, with words for tokens: what is not filled is not
    computed either.
    """
    folder = Path(__file__).parents[2] / "data" / "sample" / "conversations"
    lengths = [
        len(json.dumps(json.loads(line)["messages"]).split())
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.open()
    ]
    assert len(lengths) > 300 and unfilled_share(Order(lengths, 7, batch=64), 8 * max(lengths), 20) < 0.05


@pytest.mark.parametrize("count", [1, 2])
def test_the_layout_of_packs_is_known_without_making_them(count):
    """CUDA graphs are captured before the first step, for exactly the packs that will come."""
    numbers = random.Random(2)
    rows = [conversation(length, 1) for length in (numbers.randint(2, 90) for _ in range(9))]
    for rank in range(count):
        made = [pack.documents for pack in rank_packs(rows, rank, count, 100, False, NANO)]
        assert rank_layouts(rows, rank, count, 100, NANO) == made


def test_graphs_are_captured_for_the_packs_of_the_steps_that_are_left(monkeypatch):
    lengths = [5, 60, 33, 90, 12, 71, 8]
    rows, order = [conversation(length, 1) for length in lengths], Order(lengths, 7, batch=3)
    asked, said = [], []
    captured = SimpleNamespace(prepare=lambda packs, progress: (asked.extend(packs), progress(1, 2)))
    monkeypatch.setattr(loop.assemble, "capture", lambda model: captured)
    monkeypatch.setattr(
        loop.job, "progress", lambda done, total, unit, note: said.append((done, total, note))
    )
    params = SimpleNamespace(steps=6, sequence_tokens=100)
    loop.Loop.capture(
        SimpleNamespace(rows=rows, order=order, ranks=Ranks(), model=None, params=params, work=NANO), 2
    )
    left = [[rows[row] for row in order.step(step)] for step in range(2, 6)]
    wanted = {pack.documents for its in left for pack in rank_packs(its, 0, 1, 100, False, NANO)}
    assert set(asked) == wanted and len(asked) == len(wanted)
    assert said == [(1, 2, "capturing CUDA graphs")]


@pytest.mark.parametrize(("start", "wanted"), [(0, [0, 2]), (1, [1, 2]), (3, [3])])
def test_graphs_are_captured_at_the_start_and_once_more_when_rounding_sets_in(start, wanted):
    """Those of rounded steps are others; a run that is resumed behind that point captures them alone."""
    captured = []
    its = SimpleNamespace(
        task=SimpleNamespace(device="cuda"),
        ranks=Ranks(),
        params=SimpleNamespace(steps=5, cuda_graphs=True, sharded=False, eval_every=9, save_every=9),
        model=SimpleNamespace(train=lambda: None),
        history=loop.History(),
        start=start,
        held_out_tokens=0,
        teacher=None,
        before_step=lambda step: step == 2,
        capture=captured.append,
        step=lambda step: None,
        save=lambda done: None,
    )
    loop.Loop.run(its)
    assert captured == wanted
