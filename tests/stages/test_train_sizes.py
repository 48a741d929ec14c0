"""How large steps are: by tokens instead of conversations, what is refused, what a run says of its steps."""

import json

import pytest
import short

from stages import job
from stages.train import sizes
from stages.train.loop import Loop
from stages.train.pack import Order


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def said(monkeypatch):
    """Message and remedy of every warning."""
    found = []
    monkeypatch.setattr(job, "warning", lambda message, remedy="": found.append((message, remedy)))
    return found


def test_a_run_by_tokens_trains_the_conversations_that_fit_and_reports_them(made, tmp_path, monkeypatch):
    seen, right = [], Loop.packs

    def packs(self, rows):
        seen.append([row["number"] for row in rows])
        return right(self, rows)

    monkeypatch.setattr(Loop, "packs", packs)
    output = short.run(tmp_path, made, batch_tokens=200, steps=6, eval_every=6, save_every=6)
    lengths = [4 * length + 12 for length in short.LENGTHS]
    order = Order(lengths, 0, batch=1, batch_tokens=200)
    steps = [order.step(number) for number in range(6)]
    assert seen[1:] == steps  # the held-out rows come first
    counts, tokens = sorted(map(len, steps)), sorted(sum(lengths[row] for row in step) for step in steps)
    assert tokens[-1] <= 200 and len(set(counts)) > 1
    report = json.loads((output / "training.json").read_text())
    assert report["step_conversations"] == (counts[2] + counts[3]) / 2
    assert report["step_tokens"] == (tokens[2] + tokens[3]) / 2
    assert report["epochs"] == round(sum(counts) / 8, 2)


def test_a_report_by_conversations_has_their_number_and_none_of_a_run_of_no_steps():
    order = Order([100, 200, 300, 400], 0, batch=4)
    assert sizes.step_sizes(order, 3) == {"step_conversations": 4, "step_tokens": 1000, "epochs": 3.0}
    assert sizes.step_sizes(order, 0) == {"step_conversations": None, "step_tokens": None, "epochs": 0.0}


def test_a_trained_conversation_longer_than_a_step_is_refused_and_a_held_out_one_is_not(made, tmp_path):
    found = r"are longer than a step, the longest 144 tokens; expected at most 143 \(batch_tokens\)"
    with pytest.raises(job.StageError, match=f"1 conversations {found}.*Set batch_tokens to 144"):
        short.run(tmp_path, made, batch_tokens=143)
    sizes.check_lengths([100, 143], [144], 144, 143)
    sizes.check_lengths([100, 144], [144], 144, 0)


def test_a_step_of_more_tokens_than_all_conversations_have_is_warned_of(said):
    sizes.warn_of_sizes(Order([100] * 8, 0, batch=8, batch_tokens=800), 10, 1, "cpu")
    assert said == []
    sizes.warn_of_sizes(Order([100] * 8, 0, batch=8, batch_tokens=801), 10, 1, "cpu")
    [(message, remedy)] = said
    assert message.startswith("batch_tokens is 801, and all 8 conversations together have 800 tokens")
    assert remedy == "Set batch_tokens to 800 or less"


def test_a_run_gives_the_advice_before_it_trains(made, tmp_path, said, monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda self: pytest.fail("trained first") if not said else self.history)
    short.run(tmp_path, made, batch_tokens=4096, steps=0)
    assert [message.partition(",")[0] for message, _ in said] == ["batch_tokens is 4"]


def test_steps_too_small_for_a_gpu_are_warned_of_with_what_to_set(said):
    voice = Order([275] * 1000, 0, batch=8)
    sizes.warn_of_sizes(voice, 200, 1, "cuda")
    [(message, remedy)] = said
    assert message == "a step has 8 conversations with 2,200 tokens (medians): too few to keep a GPU busy"
    assert remedy.startswith("Set batch_tokens: 16384 instead of batch. A step then trains 7.4 times as many")
    assert "about 27 steps train as many as these 200" in remedy


@pytest.mark.parametrize(
    ("order", "steps", "world", "device"),
    [
        (Order([275] * 1000, 0, batch=8), 200, 1, "cpu"),  # a CPU is busy with any step
        (Order([1000] * 1000, 0, batch=8), 200, 1, "cuda"),
        (Order([275] * 1000, 0, batch=8, batch_tokens=16384), 200, 2, "cuda"),
        (Order([275] * 12, 0, batch=8), 200, 1, "cuda"),  # too few conversations for a step twice as large
        (Order([275] * 1000, 0, batch=8), 0, 1, "cuda"),  # a control trains nothing
    ],
)
def test_other_steps_are_not_warned_of(said, order, steps, world, device):
    sizes.warn_of_sizes(order, steps, world, device)
    assert said == []


def test_what_is_enough_for_one_gpu_is_too_little_for_four(said):
    order = Order([1000] * 1000, 0, batch=8)
    sizes.warn_of_sizes(order, 200, 4, "cuda")
    [(message, remedy)] = said
    assert "8,000 tokens (medians), for 4 GPUs" in message and "batch_tokens: 65536" in remedy


@pytest.mark.parametrize(
    ("order", "epochs", "steps"),
    [
        (Order([10] * 54, 0, batch=8), 3, 21),  # 162 rows, and a step more than 20 x 8
        (Order([10] * 8, 0, batch=8), 3, 3),
        (Order([10] * 8, 0, batch=8), 0.01, 1),
        (Order([10] * 30, 0, batch=1), 0.1, 3),  # 0.1 * 30 is above 3 in floating point
        (Order([100, 200, 300, 400], 0, batch=8, batch_tokens=1000), 2, 2),
        (Order([100, 100, 100, 100], 0, batch=8, batch_tokens=250), 2.5, 5),
    ],
)
def test_epochs_are_the_fewest_steps_that_train_each_conversation_so_often(order, epochs, steps):
    assert order.steps(epochs) == steps
    trained = [sum(len(order.step(number)) for number in range(count)) for count in (steps - 1, steps)]
    assert trained[0] < max(1, round(epochs * len(order.lengths))) <= trained[1]


def test_a_run_by_epochs_is_the_run_of_as_many_steps(made, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(job, "progress", lambda done, total, unit, note="": notes.append(note))
    changes = {"batch": 3, "eval_every": 6, "save_every": 6}
    by_epochs = short.run(tmp_path / "epochs", made, **{**changes, "epochs": 2.0, "steps": 200})
    assert notes[0] == "6 steps, 2.25 epochs of 8 conversations"
    report = json.loads((by_epochs / "training.json").read_text())
    assert (report["steps"], report["epochs"]) == (6, 2.25)
    assert short.losses(by_epochs) == short.losses(short.run(tmp_path / "steps", made, **changes, steps=6))
