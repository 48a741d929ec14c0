"""Questions that stand in the training data: a model that has learnt the answer by heart passes them.

Two texts are compared as their words, lower-cased, without punctuation. They are alike if difflib's ratio
of the two lists of words (2 * matching words / all words) is at least 0.9: the same words, or one of ten
changed, or one of five added. The nearest pair of the sample data, two questions that differ in the one
word that matters, has 0.875.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from stages.check import Finding
from stages.evaluate.questions import Question

ALIKE = 0.9
STANDS_ALONE = 6  # words of a last turn from which on it is compared without what was said before it
Words = tuple[str, ...]


def words(text: str) -> Words:
    return tuple(re.findall(r"\w+", text.lower()))


def question_words(messages: list[dict[str, Any]]) -> tuple[Words, Words]:
    """What `messages` ask: the words from the last user message on (a tool's results with it), and the
    user's before that.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)

    def words_of(part: list[dict[str, Any]], roles: tuple[str, ...]) -> Words:
        return words(" ".join(m.get("content") or "" for m in part if m["role"] in roles))

    return words_of(messages[last:], ("user", "tool")), words_of(messages[:last], ("user",))


def alike(a: Words, b: Words) -> bool:
    if a == b:
        return True
    if not a or not b or 2 * min(len(a), len(b)) < ALIKE * (len(a) + len(b)):
        return False
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE


def findings(
    questions: list[Question], training: Iterable[tuple[str, list[dict[str, Any]]]]
) -> list[Finding]:
    """A finding for every question that a training conversation, given as (place, messages), holds exactly
    or nearly.
    """
    compared = [(question, *question_words(question.row["messages"])) for question in questions]
    index = _rare_word_index([last for _, last, _ in compared])
    matches: dict[int, tuple[str, bool]] = {}
    for place, messages in training:
        for last, before in _turns(messages):
            for number in {n for word in last or ("",) for n in index.get(word, ())} - matches.keys():
                _, question_last, question_before = compared[number]
                if alike(question_last, last) and (
                    len(question_last) >= STANDS_ALONE or alike(question_before, before)
                ):
                    matches[number] = (place, question_last == last)
    return [
        Finding(
            compared[number][0].place,
            f"question {compared[number][0].row['id']}, which {'stands' if identical else 'nearly stands'} in"
            f" the training data at {place}",
            "questions that were never trained on",
            "Remove it from one of the two, or ask something else.",
        )
        for number, (place, identical) in sorted(matches.items())
    ]


def _turns(messages: list[dict[str, Any]]) -> Iterator[tuple[Words, Words]]:
    """What is asked before each answer of a conversation."""
    for position, message in enumerate(messages):
        if message["role"] == "assistant" and any(m["role"] == "user" for m in messages[:position]):
            yield question_words(messages[:position])


def _rare_word_index(texts: list[Words]) -> dict[str, list[int]]:
    """Word -> numbers of the texts to compare with a text that holds it.

    A text alike to one of n words lacks at most 2/11 of them: (n + m) * 0.9 / 2 words match, and m is at
    least 9/11 n. So one of its int(2/11 n) + 1 rarest is in it, and the others need not be looked up.
    """
    common = Counter(word for text in texts for word in set(text))
    index: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        rarest = sorted(text, key=lambda word: common[word])[: int(len(text) * 2 / 11) + 1]
        for word in {*rarest} or {""}:
            index[word].append(number)
    return index
