"""loss.png can be read at any range of losses."""

import pytest

from stages.train import picture


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws curves, and returns the figure."""
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)

    def draw(train, held_out, kept, epochs=3.0):
        title = "Learnt: " + "a long sentence " * 12
        picture.draw(train, held_out, kept, epochs, title, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        return pyplot.gcf()

    yield draw
    monkeypatch.undo()
    pyplot.close("all")


def numbers(axis):
    """The labels of an axis that are inside its limits."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label.get_text() for place, label in ticks if low <= place <= high and label.get_text()]


def falling(first, last, steps=40):
    return {step: first * (last / first) ** (step / steps) for step in range(1, steps + 1)}


@pytest.mark.parametrize(
    ("first", "last"), [(2.0, 1.1), (12.0, 0.01), (6.8, 5.8), (0.006, 0.005), (12, 4.6), (1e3, 1e-4)]
)
def test_the_axis_of_losses_has_numbers_at_any_range(drawn, first, last):
    [axes] = drawn(falling(first, last), {0: first, 20: last, 40: last}, 20).axes
    assert 3 <= len(numbers(axes.yaxis)) <= 12


def test_both_curves_and_the_kept_step_are_named_in_letters_that_can_be_read(drawn):
    figure = drawn(falling(2.0, 1.1), {0: 2.0, 20: 1.21, 40: 1.48}, 20)
    [axes] = figure.axes
    kept, training, held_out = [text.get_text() for text in axes.texts]
    assert (kept, held_out) == ("kept: step 20, 1.21", "held out 1.48") and training.startswith("training 1.")
    labels = [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert min(text.get_size() for text in [*axes.texts, *labels, *figure.texts]) >= 9


def test_labels_of_curves_that_end_together_do_not_overlap(drawn):
    figure = drawn(dict.fromkeys(range(1, 41), 1.2), {0: 2.0, 40: 1.2}, 40)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts[1:]]
    assert not boxes[0].overlaps(boxes[1])


@pytest.mark.parametrize("steps", [3, 7, 40, 200])
def test_steps_are_whole_numbers(drawn, steps):
    [axes] = drawn(falling(2.0, 1.1, steps), {0: 2.0, steps: 1.2}, steps).axes
    assert all(text.isdigit() for text in numbers(axes.xaxis))


@pytest.mark.parametrize(("train", "held_out"), [({}, {0: 6.2}), ({}, {}), (falling(2.0, 1.0), {})])
def test_runs_without_steps_or_held_out_losses_are_drawn_too(drawn, train, held_out):
    drawn(train, held_out, len(train), 0.0)
