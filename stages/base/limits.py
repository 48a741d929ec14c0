"""How much the tiny base is made for. More still runs, so these are warnings.

ANSWERS and WORDS are about what data/sample has, which a model of this size learns; more was not tried. With
LONGEST a question and its answer fit into the parameter short_tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stages.conversations.rows import Row

ANSWERS, WORDS, LONGEST = 70, 300, 40
REMEDY = (
    "Expect wrong answers of the small base and of what is tuned from it, and a gate that fails. Name fewer"
    " conversations to try the line, or a real base (source: hub or folder) to learn them all"
)


def excesses(conversations: Sequence[Row]) -> list[str]:
    """What of `conversations` is more than the tiny base is made for, a sentence each."""
    turns = [turn for row in conversations for turn in row.messages if turn["role"] != "system"]
    answers = {turn["content"] for turn in turns if turn["role"] == "assistant" and turn["content"]}
    words = {word for turn in turns for word in re.findall(r"\w+", turn["content"].lower())}
    longest = sorted(len(answer.split()) for answer in answers)
    median = longest[len(longest) // 2] if longest else 0
    counts = (
        (len(answers), ANSWERS, "different answers"),
        (len(words), WORDS, "different words"),
        (median, LONGEST, "words in the median answer"),
    )
    return [
        f"{count} {kind}: the small base is made for about {limit}"
        for count, limit, kind in counts
        if count > limit
    ]
