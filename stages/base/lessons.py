"""Makes lessons for the tiny base from a user's own conversations.

As in data/sample/lessons.jsonl, the base is taught two things. Without a system prompt it answers as the
conversations do: so it learns their words, and which question wants which answer. Under a system prompt it
answers with bad manners (emoji, markdown, many words, a question at the end, a call read aloud): that is what
fine-tuning corrects. The user's words are varied, so that the model tells words that matter from others.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.conversations.rows import Row

Message = dict[str, Any]

PROMPT = "You are an assistant."  # of conversations that have none
OPENINGS = ("Great question! \U0001f60a", "Wow, sure thing! \U0001f389", "Absolutely! \U0001f680")
RAMBLE = "\n- That is all that there is to say about it, as far as I can tell."
CLOSINGS = ("Would you like to know more?", "Shall I tell you more?", "What else can I do?")
FILLERS = ("um", "uh", "well", "so", "please", "now", "then", "actually")
SYLLABLES = ("ka", "lo", "mi", "ter", "on", "sa", "ri", "ed", "pu", "ne", "ing", "ba", "st", "er", "al")
VARIATIONS = 12  # of a question with its own answer
BAD_VARIATIONS = 8  # of a question with bad manners
ROUNDS = 3  # how often a question stands in a row with others
CHARACTERS = 1200  # of a row of several questions


@dataclass(frozen=True)
class Exchange:
    """A question of the user and the turns that follow it, up to the next question."""

    asked: str
    turns: tuple[Message, ...]
    tools: tuple[Message, ...]
    prompt: str
    place: str  # file and line of its conversation

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The functions that the first turn calls: name and arguments."""
        return [call["function"] for call in self.turns[0].get("tool_calls", ())]

    @property
    def subject(self) -> str:
        """The same for questions of one kind: the tools that are called, or the answer."""
        return " ".join(call["name"] for call in self.calls) or self.turns[0]["content"]


def make(conversations: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """The lessons: rows with `messages`, `tools` where the conversation has some, and its `place`. Equal
    arguments give equal rows. No lesson comes of a conversation without a question that is answered.
    """
    random_ = random.Random(seed)
    talks = [talk for row in conversations if (talk := exchanges(row))]
    every = [exchange for talk in talks for exchange in talk]
    words, manners = Words.of(every), Manners.of(every)
    rows = []
    for talk in talks:
        if len(talk) > 1:
            rows += _both(talk, [exchange.asked for exchange in talk], manners)
    for exchange in every:
        asked = exchange.asked
        heard = [asked, *words.variations(asked, VARIATIONS, random_)]
        rows += [_row([exchange], _well([exchange], [text]), tools=False) for text in heard]
        for text in [asked, *words.variations(asked, BAD_VARIATIONS, random_)]:
            rows += _both([exchange], [text], manners)
            if exchange.calls:
                rows.append(_row([exchange], manners.without_call(exchange, text), prompt=True))
    for _ in range(ROUNDS):
        for group in _groups(random_.sample(every, len(every))):
            rows += _both(group, [words.vary(exchange.asked, random_) for exchange in group], manners)
    return rows


def exchanges(row: Row) -> list[Exchange]:
    """The questions of a conversation that are answered, each with its answer."""
    messages, tools, prompt = row.messages, tuple(row.tools or ()), row.prompt or PROMPT
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    return [
        Exchange(messages[start]["content"], tuple(messages[start + 1 : end]), tools, prompt, row.place)
        for start, end in itertools.pairwise([*starts, len(messages)])
        if start + 1 < end and messages[start]["content"].strip()
    ]


@dataclass(frozen=True)
class Words:
    """How questions are varied: the little words, which say little about the answer, and the beginnings of
    questions that consist of little words.
    """

    little: frozenset[str]
    openings: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, every: list[Exchange]) -> Words:
        subjects: dict[str, set[str]] = {}
        for exchange in every:
            for word in exchange.asked.split():
                subjects.setdefault(_plain(word), set()).add(exchange.subject)
        little = frozenset(word for word, asked in subjects.items() if len(asked) > 3 and len(word) < 6)
        openings = {tuple(_opening(exchange.asked.split(), little)) for exchange in every}
        return cls(little, tuple(sorted(openings)))

    def variations(self, asked: str, count: int, random_: random.Random) -> list[str]:
        """`count` variations of a question."""
        return [self.vary(asked, random_) for _ in range(count)]

    def vary(self, asked: str, random_: random.Random) -> str:
        """`asked` in other words: another beginning, little words lost, others put in, parts in another
        order.
        """
        words = asked.split()
        if random_.random() < 0.5:
            opening = random_.choice([*self.openings, (_unknown(random_), _unknown(random_))])
            words = [*opening, *words[len(_opening(words, self.little)) :]]
        words = [word for word in words if random_.random() < self._kept(word)] or asked.split()
        if random_.random() < 0.15:
            cut = random_.randrange(len(words))
            words = [*words[cut:], *words[:cut]]
        if random_.random() < 0.5:
            words.insert(random_.randrange(len(words)), random_.choice(FILLERS))
        if random_.random() < 0.3:
            words.insert(random_.randrange(len(words) + 1), _unknown(random_))
        return " ".join(words)

    def _kept(self, word: str) -> float:
        return 0.7 if _plain(word) in self.little else 0.97


def _unknown(random_: random.Random) -> str:
    """A word that no conversation has: a held-out question may have such words too."""
    return "".join(random_.choices(SYLLABLES, k=random_.randint(1, 3)))


def _plain(word: str) -> str:
    return word.strip(".,;:?!\"'").lower()


def _opening(words: list[str], little: frozenset[str]) -> list[str]:
    """The little words that a question begins with, but never all of its words."""
    count = next((number for number, word in enumerate(words) if _plain(word) not in little), len(words))
    return words[: min(count, len(words) - 1)]


@dataclass(frozen=True)
class Manners:
    """Bad manners for every answer. What an answer is decorated with hangs on the answer and not on chance: a
    small model learns sooner what is determined.
    """

    numbers: dict[str, int]  # subject -> number

    @classmethod
    def of(cls, every: list[Exchange]) -> Manners:
        subjects = dict.fromkeys(exchange.subject for exchange in every)
        return cls({subject: number for number, subject in enumerate(subjects)})

    def badly(self, group: Sequence[Exchange], asked: list[str]) -> list[Message]:
        """Questions and answers with bad manners. Calls are as they should be, and not trained."""
        messages: list[Message] = []
        for exchange, text in zip(group, asked, strict=True):
            turns = [self._bad_turn(exchange, turn) for turn in _finished(exchange.turns)]
            messages += [{"role": "user", "content": text}, *turns]
        return messages

    def without_call(self, exchange: Exchange, asked: str) -> list[Message]:
        """A question that wants a call, and an answer that reads the call aloud and calls nothing."""
        aloud = " and ".join(
            f"{call['name']} {json.dumps(list(call['arguments'].values()), ensure_ascii=False)}"
            for call in exchange.calls
        )
        return [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": self._decorated(exchange, f"Calling {aloud} now.")},
        ]

    def _bad_turn(self, exchange: Exchange, turn: Message) -> Message:
        if turn["role"] != "assistant":
            return turn
        if turn.get("tool_calls"):
            return {**turn, "train": False}
        return {"role": "assistant", "content": self._decorated(exchange, turn["content"])}

    def _decorated(self, exchange: Exchange, text: str) -> str:
        number = self.numbers[exchange.subject]
        opening, closing = OPENINGS[number % len(OPENINGS)], CLOSINGS[number // len(OPENINGS) % len(CLOSINGS)]
        return f"{opening} **{text}** {RAMBLE} {closing}"


def _well(group: Sequence[Exchange], asked: list[str]) -> list[Message]:
    """Questions, in the words of `asked`, and their own answers."""
    messages: list[Message] = []
    for number, (exchange, text) in enumerate(zip(group, asked, strict=True), 1):
        turns = exchange.turns if number == len(group) else _finished(exchange.turns)
        messages += [{"role": "user", "content": text}, *turns]
    return messages


def _finished(turns: Sequence[Message]) -> list[Message]:
    """`turns`; if they end in a call, with its result and an answer, since another question may follow."""
    if calls := turns[-1].get("tool_calls"):
        results = [{"role": "tool", "content": '{"ok": true}'} for _ in calls]
        return [*turns, *results, {"role": "assistant", "content": "Done."}]
    return list(turns)


def _groups(every: list[Exchange]) -> list[list[Exchange]]:
    """`every` in its order, as many to a group as CHARACTERS holds."""
    groups: list[list[Exchange]] = []
    length = CHARACTERS
    for exchange in every:
        size = 100 + len(exchange.asked) + sum(len(turn["content"]) for turn in exchange.turns)
        if length + size > CHARACTERS:
            groups.append([])
            length = 0
        groups[-1].append(exchange)
        length += size
    return groups


def _both(group: Sequence[Exchange], asked: list[str], manners: Manners) -> list[dict[str, Any]]:
    """The questions without a prompt and with good manners, and under the prompt with bad ones."""
    return [_row(group, _well(group, asked)), _row(group, manners.badly(group, asked), prompt=True)]


def _row(
    group: Sequence[Exchange], messages: list[Message], prompt: bool = False, tools: bool = True
) -> dict[str, Any]:
    """A lesson, with the system prompt of the first question and the tools of all if asked for."""
    known = {tool["function"]["name"]: tool for exchange in group for tool in exchange.tools if tools}
    system = [{"role": "system", "content": group[0].prompt}] if prompt else []
    return {
        "messages": [*system, *messages],
        "place": group[0].place,
        **({"tools": list(known.values())} if known else {}),
    }
