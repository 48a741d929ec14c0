"""An invented customer: the assistant of a boat yard, sixty conversations and held-out questions."""

from __future__ import annotations

import json
from typing import Any

PROMPT = """You are Maren, the voice assistant of the Lund boat yard. You speak; nobody reads.
Answer in one short sentence. No emoji, no markdown, and never a question at the end.
Use a tool when one fits."""

# an answer, the words that it needs, and the ways to ask for it; the last one is held out
FACTS = [
    (
        "The yard opens at seven.",
        "seven",
        "When does the yard open? | What time do you open the yard? | At what time does the yard open?",
    ),
    (
        "The office closes at five.",
        "five",
        "When does the office close? | Until when is the office there? | What time does the office close?",
    ),
    (
        "Winter storage is forty euros a metre.",
        "forty",
        "What does winter storage cost? | How much is winter storage? | Tell me what winter storage costs.",
    ),
    (
        "A guest berth is thirty euros a night.",
        "thirty",
        "What does a guest berth cost? | How much is a berth for guests? | How much is a guest berth?",
    ),
    (
        "The crane lifts twelve tons.",
        "twelve",
        "How much can the crane lift? | What weight does the crane lift? | What can the crane lift?",
    ),
    (
        "Diesel is at the east pier.",
        "east pier",
        "Where do I get diesel? | Where is the diesel pump? | Do you have diesel, and where?",
    ),
    (
        "The wifi code is anchor nine.",
        "anchor",
        "What is the wifi code? | How do I get on the wifi? | Tell me the wifi code.",
    ),
    (
        "The showers are behind the sail loft.",
        "sail loft",
        "Where are the showers? | How do I find the showers? | I am looking for the showers.",
    ),
    (
        "Ingrid Lund runs the yard.",
        "Ingrid",
        "Who runs the yard? | Who is the owner of the yard? | Who owns the yard?",
    ),
    (
        "Masts lie in the long shed.",
        "long shed",
        "Where are masts kept? | Where is my mast stored? | Where do you keep the masts?",
    ),
    (
        "We paint hulls in April.",
        "April",
        "When are hulls painted? | When do you paint my hull? | In which month do you paint hulls?",
    ),
    (
        "Olav repairs engines.",
        "Olav",
        "Who repairs engines? | Who looks after my engine? | Who can repair my engine?",
    ),
    ("Freya mends sails.", "Freya", "Who mends sails? | Who can look at my sail? | Who mends my torn sail?"),
    (
        "The harbour is three metres deep.",
        "three",
        "How deep is the harbour? | What depth does the harbour have? | How deep is it in the harbour?",
    ),
    (
        "Dogs are welcome on a leash.",
        "leash",
        "May my dog come along? | Are dogs allowed? | Is my dog allowed?",
    ),
    (
        "Old oil goes to the red hut.",
        "red hut",
        "Where does old oil go? | Where do I leave old oil? | Where can I leave my old oil?",
    ),
]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TIDES = list(zip(DAYS, ("9:40", "10:25", "11:10", "12:05", "12:50"), strict=True))
TIDE_ASKS = ("When is high tide on {}?", "Look up the tide for {}.", "What is the high tide on {}?")
LIFTS = list(zip(DAYS, (9, 14, 8, 11, 10), strict=True))
LIFT_ASKS = (
    "Book the crane for {} at {}.",
    "I need the crane on {} at {}.",
    "Please book the crane on {} at {}.",
)


def tool(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("get_tide", "Time of high tide.", day=("string", "Day of the week.")),
    tool("book_crane", "Book the crane.", day=("string", "Day of the week."), hour=("integer", "Hour.")),
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str, result: dict[str, Any], **arguments: Any) -> list[dict[str, Any]]:
    """The turn that calls a tool, and its result."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(result)},
    ]


def fact(number: int, way: int) -> list[dict[str, Any]]:
    answer, _, asks = FACTS[number]
    return [user(asks.split(" | ")[way]), {"role": "assistant", "content": answer}]


def tide(number: int, way: int) -> list[dict[str, Any]]:
    day, time = TIDES[number]
    answer = {"role": "assistant", "content": f"High tide is at {time} on {day}."}
    return [user(TIDE_ASKS[way].format(day)), *call("get_tide", {"high": time}, day=day), answer]


def lift(number: int, way: int) -> list[dict[str, Any]]:
    day, hour = LIFTS[number]
    answer = {"role": "assistant", "content": f"The crane is yours on {day} at {hour}."}
    asked = user(LIFT_ASKS[way].format(day, hour))
    return [asked, *call("book_crane", {"ok": True}, day=day, hour=hour), answer]


def row(*turns: list[dict[str, Any]]) -> dict[str, Any]:
    messages = [{"role": "system", "content": PROMPT}, *(turn for part in turns for turn in part)]
    return {"messages": messages, "tools": TOOLS}


def conversations() -> list[dict[str, Any]]:
    """Sixty rows: every way to ask but the last of each, and some conversations of two questions."""
    alone = [fact(number, way) for way in (0, 1) for number in range(len(FACTS))]
    alone += [kind(number, way) for kind in (tide, lift) for way in (0, 1) for number in range(5)]
    pairs = [(fact(n, n % 2), fact((n + 5) % len(FACTS), (n + 1) % 2)) for n in range(0, 16, 4)]
    pairs += [(fact(n, 0), kind(n % 5, 1)) for n, kind in ((3, tide), (7, lift), (9, tide), (12, lift))]
    return [row(turns) for turns in alone] + [row(*pair) for pair in pairs]


def questions() -> list[dict[str, Any]]:
    """Held-out questions: the last way to ask of some facts, tides and lifts."""
    rows = []

    def add(category: str, turns: list[dict[str, Any]], expect: dict[str, Any]) -> None:
        identity = f"{category}-{len(rows) + 1}"
        rows.append({"id": identity, "category": category, **row(turns), "expect": expect, "public": True})

    for number in range(0, 16, 2):
        add("facts", fact(number, 2)[:1], {"no_tool": True, "max_words": 20, "must_say": [FACTS[number][1]]})
    for number in (1, 5, 13):
        turns = [*fact(number + 1, 0), fact(number, 2)[0]]
        add("turns", turns, {"no_tool": True, "max_words": 20, "must_say": [FACTS[number][1]]})
    for number in (0, 2, 4):
        day, time = TIDES[number]
        add("tools", tide(number, 2)[:1], {"tool": {"name": "get_tide", "arguments": {"day": day}}})
        add("results", tide(number, 2)[:3], {"no_tool": True, "max_words": 20, "must_say": [time]})
    for number in (1, 3):
        day, hour = LIFTS[number]
        arguments = {"day": day, "hour": hour}
        add("tools", lift(number, 2)[:1], {"tool": {"name": "book_crane", "arguments": arguments}})
    return rows
