"""Finds questions that are also in the training data: a model that has memorised the answer passes them.

Two texts are compared as lists of words, in lower case and without punctuation. They are alike if difflib's
ratio (2 * matching words / all words) is at least 0.9: the same words, or one of ten changed, or one of five
added. In the sample data the closest pair of different questions differs in one decisive word and has a ratio
of 0.875.
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
STANDS_ALONE = 6  # a last turn of at least so many words is compared without the turns before it
Words = tuple[str, ...]


def words(text: str) -> Words:
    """The words of `text` in lower case."""
    return tuple(re.findall(r"\w+", text.lower()))


def question_words(messages: list[dict[str, Any]]) -> tuple[Words, Words]:
    """The words from the last user message on (tool results included), and the words of the user messages
    before it.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)

    def words_of(part: list[dict[str, Any]], roles: tuple[str, ...]) -> Words:
        return words(" ".join(m.get("content") or "" for m in part if m["role"] in roles))

    return words_of(messages[last:], ("user", "tool")), words_of(messages[:last], ("user",))


def alike(a: Words, b: Words) -> bool:
    """Whether two texts have a ratio of at least ALIKE."""
    if a == b:
        return True
    if not a or not b or 2 * min(len(a), len(b)) < ALIKE * (len(a) + len(b)):
        return False
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE


def findings(
    questions: list[Question], training: Iterable[tuple[str, list[dict[str, Any]]]]
) -> list[Finding]:
    """A finding for every question that is exactly or nearly in a training conversation. `training` yields
    (place, messages).
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
    """The words of the question before each answer of a conversation."""
    for position, message in enumerate(messages):
        if message["role"] == "assistant" and any(m["role"] == "user" for m in messages[:position]):
            yield question_words(messages[:position])


def _rare_word_index(texts: list[Words]) -> dict[str, list[int]]:
    """Word -> numbers of the texts that may be alike to a text with that word.

    If a text of n words is alike to one of m words, (n + m) * 0.9 / 2 words match, and m is at least 9/11 n.
    So at most 2/11 n words do not match, and at least one of the int(2/11 n) + 1 rarest words does. The index
    therefore needs only these.
    """
    common = Counter(word for text in texts for word in set(text))
    index: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        rarest = sorted(text, key=lambda word: common[word])[: int(len(text) * 2 / 11) + 1]
        for word in {*rarest} or {""}:
            index[word].append(number)
    return index
