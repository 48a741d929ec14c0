"""What the loss curves of a run say: one of seven verdicts, a sentence, and what to try.

Held-out losses are compared with the fall from the base's loss to the kept step's, because the same 0.05 nats
are much for a model that went from 1.3 to 1.2 and nothing for one that went from 11 to 1.2. Curves are noisy,
so means of a fifth of the curve are compared, and a difference counts only if it is larger than three
standard deviations of the curve's own noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

Name = Literal["learnt", "overfitted", "still_falling", "flat", "diverged", "no_held_out", "not_trained"]

HARDLY = 0.03  # a smaller change, as a share of a loss, is none
PART = 0.1  # a smaller change, as a share of the whole fall, does not matter
DEVIATIONS = 3
BY_HEART = 0.3  # the training loss fell by this share or more, so the model has learnt something
GREW = 1.2  # factor by which the training loss of a diverged run has grown
# Nats for each token: as unsure as between 20 equally likely tokens. Fluent answers have 0.5 to 2.
TOO_HIGH = 3.0
STEPS = 10  # over which training losses are averaged; those of single steps depend on the rows drawn


@dataclass(frozen=True)
class Verdict:
    """`sentence` says what the curves show. `advice` says what to try, "" if nothing has to be."""

    name: Name
    sentence: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """The verdict as training.json has it: `says` holds both texts."""
        return {"name": self.name, "says": f"{self.sentence} {self.advice}".rstrip()}


def of_curves(
    train: dict[int, float], held_out: dict[int, float], kept: int, rounded_from: int = 0
) -> Verdict:
    """The verdict on a run from its losses by step, in nats. Step 0 of `held_out` is the base's loss; `kept`
    is the step whose adapter is kept.

    Held-out losses up to step `rounded_from`, after which rounding began, are not compared with later ones,
    except for the base's.
    """
    if not train:
        return Verdict("not_trained", "Not trained: the adapter is as it began, and changes nothing.")
    if 0 not in held_out:
        return _unseen(train)
    losses = {step: loss for step, loss in held_out.items() if step > rounded_from}
    levels = _smooth(list(losses.values()))
    noise = DEVIATIONS * _deviation(list(losses.values()))
    base, best, end, last = held_out[0], held_out[kept], levels[-1], max(losses)
    fall = base - min(levels)
    matters = max(PART * fall, HARDLY * best, noise)
    if end - min(levels) > matters:
        return _risen(train, base, best, end, kept)
    if fall <= max(HARDLY * base, noise):
        return _unchanged(train, base, best, kept)
    curve = dict(zip(losses, levels, strict=True))
    late = _at(curve if rounded_from else {0: base, **curve}, last * 2 / 3) - end
    if len(losses) > 1 and late > matters:
        return Verdict(
            "still_falling",
            f"Still falling: held-out loss fell from {nats(base)} to {nats(best)}, by {nats(late)} of that in"
            " the last third of the steps.",
            "Train for more steps or epochs.",
        )
    if best > TOO_HIGH:
        return Verdict(
            "flat",
            f"Too high: held-out loss fell from {nats(base)} to {nats(best)} at step {kept}, and fluent"
            f" answers have less than {TOO_HIGH:g} nats.",
            "Raise learning_rate or rank, choose targets: all, or check that the base speaks this language.",
        )
    return Verdict(
        "learnt",
        f"Learnt: held-out loss fell from {nats(base)} to {nats(best)} at step {kept}.",
        "" if len(losses) > 1 else "Lower eval_every: one held-out loss does not show how the run went.",
    )


def nats(loss: float) -> str:
    """A loss with two decimals, or with three digits if it is small."""
    return f"{loss:.2f}" if abs(loss) >= 0.1 else f"{loss:.2g}"


def _unseen(train: dict[int, float]) -> Verdict:
    first, last = train[min(train)], _around(train, max(train))
    return Verdict(
        "no_held_out",
        f"Unknown: the training loss went from {nats(first)} to {nats(last)}, and without held-out"
        " conversations nothing shows whether the model has learnt or memorised.",
        "Set eval_share of stage data above 0.",
    )


def _risen(train: dict[int, float], base: float, best: float, end: float, kept: int) -> Verdict:
    """The held-out loss was lower at the kept step than at the end."""
    before, after = _around(train, kept), _around(train, max(train))
    course = f"held-out loss was lowest at step {kept} ({nats(best)}) and rose to {nats(end)}"
    if after > GREW * before:
        return Verdict(
            "diverged",
            f"Diverged: {course}, and the training loss rose from {nats(before)} to {nats(after)} too.",
            "Lower learning_rate, or raise warmup_steps.",
        )
    if best >= base:
        course = f"held-out loss was never below the base's {nats(base)} and rose to {nats(end)}"
    return Verdict(
        "overfitted",
        f"Overfitted: {course} while the training loss went from {nats(before)} to {nats(after)}.",
        "Fewer epochs, more conversations or a lower rank help.",
    )


def _unchanged(train: dict[int, float], base: float, best: float, kept: int) -> Verdict:
    """The held-out loss of the kept step is hardly below the base's, or above it."""
    first, last = train[min(train)], _around(train, max(train))
    early = _around(train, 1)  # the first step's loss alone may be high or low by chance
    course = f"held-out loss was {nats(base)} before training and {nats(best)} at step {kept}"
    if last < (1 - BY_HEART) * min(first, early):
        return Verdict(
            "overfitted",
            f"Overfitted: {course}, while the training loss fell from {nats(first)} to {nats(last)}.",
            "Are the held-out conversations of another kind than the trained ones? More conversations help.",
        )
    if last > GREW * max(first, early) or best > (1 + HARDLY) * base:
        return Verdict(
            "diverged",
            f"Diverged: {course}, and the training loss went from {nats(first)} to {nats(last)}.",
            "Lower learning_rate, or raise warmup_steps.",
        )
    return Verdict(
        "flat",
        f"Hardly changed: {course}.",
        "Raise learning_rate, train for more steps, or choose targets: all.",
    )


def _smooth(losses: list[float]) -> list[float]:
    """For each loss the mean of the last fifth of the curve up to it, and of at least one loss."""
    width = max(1, len(losses) // 5)
    return [fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def _deviation(losses: list[float]) -> float:
    """The standard deviation of noise in a curve, from its second differences: a trend has small ones. 0 for
    fewer than five losses, of which it cannot be told.
    """
    if len(losses) < 5:
        return 0.0
    slopes = [after - before for before, after in pairwise(losses)]
    # the median of |x| is 0.6745 deviations, and a second difference has six times the variance of a loss
    return median(abs(after - before) for before, after in pairwise(slopes)) / (0.6745 * 6**0.5)


def _around(train: dict[int, float], step: int) -> float:
    """The mean training loss of the STEPS steps up to `step`, or of the first ones if there are fewer."""
    losses = list(train.values())
    end = max(STEPS, sum(number <= step for number in train))
    return fmean(losses[max(0, end - STEPS) : end])


def _at(losses: dict[int, float], step: float) -> float:
    """The loss at `step`, on the line between the two measurements around it; before the first one, that."""
    before = max((number for number in losses if number <= step), default=min(losses))
    after = min((number for number in losses if number > step), default=before)
    if after == before:
        return losses[before]
    share = (step - before) / (after - before)
    return losses[before] + share * (losses[after] - losses[before])
