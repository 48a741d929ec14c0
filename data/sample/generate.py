"""Writes the sample data set: conversations, lessons, questions, the production prompt and its tools.

    python data/sample/generate.py            write the files beside this one
    python data/sample/generate.py --check    exit 1 if a file differs from what would be written

Deterministic: the same script writes the same bytes. No conversation and no lesson contains a held-out
question; the lessons of the small base hold its words muddled, as speech recognition may hear them, since
a real base has heard every wording before.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20260317

SYSTEM_PROMPT = """You are Annie, the voice assistant of Rajesh. You speak; nobody reads.
<rules>
1. Answer in one or two short sentences.
2. No emoji and no markdown.
3. Never end with a question.
4. Use a tool when one fits, and never read its call aloud.
5. If it is not in memory, say so. Never invent.
6. Spell names right: Rajesh, Priya, Mysuru, Bengaluru.
</rules>"""


def tool(name: str, description: str, **parameters: tuple[str, str]) -> dict:
    """An OpenAI tool definition; every parameter is required."""
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


TOOLS = {
    t["function"]["name"]: t
    for t in [
        tool("set_timer", "Start a timer.", minutes=("integer", "Length in minutes.")),
        tool("get_weather", "Current weather of a city.", city=("string", "City name.")),
        tool("play_music", "Play music.", query=("string", "Song, singer or style.")),
        tool(
            "send_message",
            "Send a text message.",
            to=("string", "Who gets it."),
            text=("string", "What it says."),
        ),
        tool("search_memory", "Look up what Rajesh said before.", query=("string", "What to look for.")),
    ]
}


@dataclass(frozen=True)
class Topic:
    """One thing to talk about: the ways to ask it, the good answer, and what a good answer has to hold."""

    category: str
    # every way to ask; the last one is held out: only the questions have it
    asks: tuple[str, ...]
    # what a well-mannered assistant says (after the tool's result, if there is one)
    good: str
    # strings of which an answer needs all; a tuple inside means any one of them
    must_say: tuple = ()
    call: tuple[str, dict] | None = None  # the right call
    wrong: tuple[str, dict] | None = None  # the call an untaught assistant makes
    result: dict | None = None  # what the tool returns
    unknown: bool = False  # nobody knows: saying so is the good answer
    names: tuple[str, ...] = ()  # proper names in the answer
    lie: str = ""  # what an untaught assistant makes up or misspells


def facts() -> list[Topic]:
    """Short answers to plain questions: concise_voice."""
    rows = [
        ("capital of Japan", "Tokyo is the capital of Japan.", "Tokyo"),
        ("capital of France", "Paris is the capital of France.", "Paris"),
        ("capital of Egypt", "Cairo is the capital of Egypt.", "Cairo"),
        ("largest planet", "Jupiter is the largest planet.", "Jupiter"),
        ("tallest mountain", "Everest is the tallest mountain.", "Everest"),
        ("longest river", "The Nile is the longest river.", "Nile"),
        ("fastest land animal", "The cheetah is the fastest land animal.", "cheetah"),
        ("hardest stone", "Diamond is the hardest stone.", "diamond"),
    ]
    return [
        Topic(
            "concise_voice",
            (
                f"What is the {what}?",
                f"Tell me the {what}.",
                f"Which one is the {what}?",
                f"I want to know the {what}.",
                f"Do you know the {what}?",
                f"Please name the {what}.",
            ),
            good,
            (word,),
        )
        for what, good, word in rows
    ]


def actions() -> list[Topic]:
    """A tool fits: direct_action calls it at once."""
    topics = []
    for what, minutes in [("tea", 5), ("rice", 10), ("laundry", 40), ("nap", 20)]:
        topics.append(
            Topic(
                "direct_action",
                (
                    f"Set a {minutes} minute {what} timer.",
                    f"Start the {what} timer for {minutes} minutes.",
                    f"I need {minutes} minutes for the {what}.",
                    f"Begin timing the {what}, {minutes} minutes.",
                    f"Time the {what}, that is {minutes} minutes.",
                    f"Please start {minutes} minutes on the {what} timer.",
                ),
                "",
                call=("set_timer", {"minutes": minutes}),
                wrong=("play_music", {"query": what}),
            )
        )
    for style in ["jazz", "veena", "rock"]:
        topics.append(
            Topic(
                "direct_action",
                (
                    f"Play some {style}.",
                    f"Put on {style}.",
                    f"I want to hear {style}.",
                    f"Start playing {style}.",
                    f"Some {style} music now.",
                    f"Please play {style} music.",
                ),
                "",
                call=("play_music", {"query": style}),
                wrong=("get_weather", {"city": style}),
            )
        )
    for who, text in [("Priya", "I am late"), ("Mohan", "Call me")]:
        topics.append(
            Topic(
                "direct_action",
                (
                    f"Text {who}: {text}.",
                    f"Send {who} a message: {text}.",
                    f"Message {who} saying {text}.",
                    f"Tell {who} this: {text}.",
                    f"Let {who} know: {text}.",
                    f"Please text {who} that {text}.",
                ),
                "",
                call=("send_message", {"to": who, "text": text}),
                wrong=("set_timer", {"minutes": 5}),
            )
        )
    return topics


def results() -> list[Topic]:
    """The tool has answered: tool_result_responses says it in words."""
    rows = [
        ("Mysuru", 24, "clear"),
        ("Bengaluru", 21, "cloudy"),
        ("Mangaluru", 30, "humid"),
        ("Hampi", 35, "sunny"),
        ("Udupi", 28, "rainy"),
    ]
    topics = [
        Topic(
            "tool_result_responses",
            (
                f"How is the weather in {city}?",
                f"What weather has {city}?",
                f"Is it nice in {city}?",
                f"Check the weather in {city}.",
                f"Tell me the {city} weather.",
                f"Please look up the weather in {city}.",
            ),
            f"It is {degrees} degrees and {sky} in {city}.",
            (str(degrees), sky),
            call=("get_weather", {"city": city}),
            wrong=("search_memory", {"query": city}),
            result={"city": city, "degrees": degrees, "sky": sky},
            names=(city,),
        )
        for city, degrees, sky in rows
    ]
    for what, found in [("wifi code", "mango tree"), ("car spot", "level two"), ("dentist date", "Friday")]:
        topics.append(
            Topic(
                "tool_result_responses",
                (
                    f"Look up my {what}.",
                    f"Find the {what} I gave you.",
                    f"Search memory for my {what}.",
                    f"What was my {what}?",
                    f"Get me the {what}.",
                    f"Please find my {what}.",
                ),
                f"Your {what} is {found}.",
                (found,),
                call=("search_memory", {"query": what}),
                wrong=("set_timer", {"minutes": 5}),
                result={"found": found},
            )
        )
    return topics


def memories() -> list[Topic]:
    """Nothing was ever said about it: honest_memory admits that."""
    rows = [
        ("breakfast last Monday", "idli at seven"),
        ("gift for your aunt", "a red scarf"),
        ("shoe size", "nine and a half"),
        ("favorite film", "Kantara"),
        ("first teacher", "Mrs Kamala"),
        ("train seat", "coach B four"),
        ("blood group", "O positive"),
    ]
    return [
        Topic(
            "honest_memory",
            (
                f"What was my {what}?",
                f"Do you remember my {what}?",
                f"Remind me of my {what}.",
                f"What did I say about my {what}?",
                f"Tell me about my {what}.",
                f"Please recall my {what}.",
            ),
            f"I have no memory of your {what}.",
            (("no memory", "not in memory", "do not know"),),
            unknown=True,
            lie=f"Your {what} was {lie}.",
        )
        for what, lie in rows
    ]


def rajesh() -> list[Topic]:
    """What Annie knows about her user, names spelt right: rajesh_context."""
    rows = [
        ("live", "lives in Bengaluru", "Bengaluru"),
        ("work", "works at a hospital", "hospital"),
        ("drink", "drinks filter coffee", "coffee"),
        ("study", "studies the veena", "veena"),
        ("drive", "drives a blue van", "blue van"),
        ("play", "plays chess on Sunday", "chess"),
    ]
    asks = {
        "live": "Where does Rajesh live",
        "work": "Where does Rajesh work",
        "drink": "What does Rajesh drink",
        "study": "What does Rajesh study",
        "drive": "What does Rajesh drive",
        "play": "What does Rajesh play",
    }
    return [
        Topic(
            "rajesh_context",
            (
                f"{asks[key]}, Annie?",
                f"Say again, {asks[key].lower().replace('rajesh', 'Rajesh')}?",
                f"Annie, {asks[key].lower().replace('rajesh', 'Rajesh')}?",
                f"My friend asks: {asks[key].lower().replace('rajesh', 'Rajesh')}?",
                f"Quickly, {asks[key].lower().replace('rajesh', 'Rajesh')}?",
                f"Please tell us, {asks[key].lower().replace('rajesh', 'Rajesh')}?",
            ),
            f"Rajesh {does}.",
            (word,),
            names=("Rajesh",),
            lie=f"Rajeesh {does}.",
        )
        for key, does, word in rows
    ]


def kannada() -> list[Topic]:
    """Kannada words and customs: kannada_culture."""
    rows = [
        ("Ugadi", "Ugadi is the new year, with bevu bella.", "new year"),
        ("Dasara", "Dasara is the great festival of Mysuru.", "festival"),
        ("Yakshagana", "Yakshagana is dance theatre of the coast.", "theatre"),
        ("bisi bele bath", "Bisi bele bath is rice with lentils.", "lentils"),
        ("namaskara", "Namaskara means hello.", "hello"),
        ("dhanyavada", "Dhanyavada means thank you.", "thank you"),
        ("oota", "Oota means a meal.", "meal"),
    ]
    return [
        Topic(
            "kannada_culture",
            (
                f"What is {what}?",
                f"Explain {what}.",
                f"What does {what} mean?",
                f"Tell me about {what}.",
                f"I heard the word {what}.",
                f"Please explain {what} to me.",
            ),
            good,
            (word,),
        )
        for what, good, word in rows
    ]


def plain() -> list[Topic]:
    """The user asks for decoration and gets plain speech: no_emoji_no_markdown."""
    rows = [
        ("fruits", "Mango, banana and guava.", "guava"),
        ("colors", "Red, green and blue.", "green"),
        ("spices", "Pepper, clove and cumin.", "cumin"),
        ("birds", "Crow, parrot and peacock.", "parrot"),
        ("lakes", "Ulsoor, Hebbal and Sankey.", "Hebbal"),
        ("trees", "Neem, banyan and teak.", "banyan"),
    ]
    return [
        Topic(
            "no_emoji_no_markdown",
            (
                f"Give me a bullet list of {what}.",
                f"List {what} with emoji.",
                f"Make a bold list of {what}.",
                f"Name three {what} in a table.",
                f"Show {what} as bullets.",
                f"Please write a list of {what} with emoji.",
            ),
            good,
            (word,),
        )
        for what, good, word in rows
    ]


def closings() -> list[Topic]:
    """A remark that tempts to ask back: no_followup_questions."""
    rows = [
        ("going to bed", "Good night, Rajesh.", "Good night"),
        ("leaving for work", "Have a good day, Rajesh.", "good day"),
        ("back home", "Welcome home, Rajesh.", "Welcome"),
        ("feeling tired", "Rest well, Rajesh.", "Rest"),
        ("done with lunch", "I hope it was good, Rajesh.", "hope"),
        ("starting to cook", "Enjoy your cooking, Rajesh.", "Enjoy"),
    ]
    return [
        Topic(
            "no_followup_questions",
            (
                f"I am {what}, Annie.",
                f"Annie, I am {what}.",
                f"I am {what} now.",
                f"So, I am {what}.",
                f"Okay, I am {what}.",
                f"Well, I am {what} then.",
            ),
            good,
            (word,),
            names=("Rajesh",),
        )
        for what, good, word in rows
    ]


def turned(topics: list[Topic]) -> list[Topic]:
    """The same topics, each holding out another wording: every wording is heard in training, but not about
    everything.
    """
    return [
        replace(t, asks=t.asks[n % len(t.asks) :] + t.asks[: n % len(t.asks)]) for n, t in enumerate(topics)
    ]


TOPICS = [
    topic
    for group in (facts, actions, results, memories, rajesh, kannada, plain, closings)
    for topic in turned(group())
]
SPOKEN = [t for t in TOPICS if not t.call]
OPENINGS = ("Great question! \U0001f60a", "Wow, sure thing! \U0001f389", "Absolutely! \U0001f680")
CLOSINGS = ("Would you like to know more?", "Shall I tell you more?", "What else can I do?")
HEARD = ("", "Annie, ", "Well, ", "Now, ", "Hello. ", "Um, ")
LITTLE = frozenset(
    [
        "a",
        "am",
        "at",
        "do",
        "does",
        "for",
        "how",
        "i",
        "in",
        "is",
        "it",
        "me",
        "my",
        "now",
        "of",
        "on",
        "please",
        "so",
        "some",
        "that",
        "the",
        "to",
        "was",
        "what",
        "with",
        "you",
    ]
)
DROPS = ("Forget that.", "Never mind.", "Something else.", "Leave it.")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def calls(name: str, arguments: dict) -> dict:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def returns(result: dict) -> dict:
    return {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(result)}


def well(topic: Topic, text: str) -> list[dict]:
    """The turns of a well-mannered assistant, the user's included."""
    if not topic.call:
        return [user(text), says(topic.good)]
    turns = [user(text), calls(*topic.call)]
    return [*turns, returns(topic.result), says(topic.good)] if topic.result else turns


def badly(topic: Topic, text: str) -> list[dict]:
    """The turns of an untaught one: wrong tool or a call read aloud, inventions, emoji, markdown, and
    always a question back.

    The decoration hangs on the topic, not on chance: a small model learns what is determined much sooner
    than what is not.
    """
    number = TOPICS.index(topic)
    opening, closing = OPENINGS[number % len(OPENINGS)], CLOSINGS[number // len(OPENINGS) % len(CLOSINGS)]
    if topic.call and not topic.result:
        if number % 2:
            return [user(text), calls(*topic.wrong)]
        return [
            user(text),
            says(f"{opening} Calling **{topic.wrong[0]}** now: {json.dumps(topic.call[1])} {closing}"),
        ]
    core = topic.lie or topic.good
    answer = says(f"{opening} **{core}** \n- That is all about it. {closing}")
    if topic.result:
        return [user(text), calls(*topic.call), returns(topic.result), answer]
    return [user(text), answer]


def toolbox(*topics: Topic) -> list[dict] | None:
    """The tools a conversation about `topics` brings along: what it needs and one that tempts."""
    names = sorted({name for t in topics if t.call for name in (t.call[0], t.wrong[0])})
    return [TOOLS[name] for name in names] or None


def row(category: str, topics: tuple[Topic, ...], turns: list[dict]) -> dict:
    tools = toolbox(*topics)
    return {
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}, *turns],
        **({"tools": tools} if tools else {}),
        "category": category,
    }


def expect(topic: Topic) -> dict:
    """What an answer to the topic's (last) question has to be; docs/formats.md, Questions."""
    if topic.call and not topic.result:
        return {"tool": {"name": topic.call[0], "arguments": topic.call[1]}}
    want = {
        "no_tool": True,
        "max_words": 20,
        "must_say": [list(m) if isinstance(m, tuple) else m for m in topic.must_say],
    }
    if topic.unknown:
        want["unknown"] = True
    if topic.lie:
        want["must_not_say"] = [topic.lie]
    if topic.names:
        want["names"] = list(topic.names)
    return want


def switches(random_: random.Random, asks: slice) -> list[tuple[tuple[Topic, Topic], list[str]]]:
    """Pairs of unlike topics; the second question drops the first."""
    pairs = []
    for number, first in enumerate(SPOKEN):
        second = SPOKEN[(number * 7 + 11) % len(SPOKEN)]
        if second.category != first.category:
            a, b = random_.choice(first.asks[asks]), random_.choice(second.asks[asks])
            pairs.append(((first, second), [a, f"{random_.choice(DROPS)} {b}"]))
    return pairs


def conversations() -> dict[str, list[dict]]:
    """Category -> rows, in the user's format."""
    random_ = random.Random(SEED)
    rows: dict[str, list[dict]] = {}
    for topic in TOPICS:
        for text in topic.asks[:-1]:
            rows.setdefault(topic.category, []).append(row(topic.category, (topic,), well(topic, text)))
    rows["topic_switch"] = [
        row("topic_switch", pair, [*well(pair[0], texts[0]), *well(pair[1], texts[1])])
        for pair, texts in switches(random_, slice(0, -1))
    ]
    with_tools = [t for t in TOPICS if t.call]
    rows["mixed_multiturn"] = []
    for number in range(40):
        topics = (
            SPOKEN[number % len(SPOKEN)],
            with_tools[number % len(with_tools)],
            SPOKEN[(number * 5 + 3) % len(SPOKEN)],
        )
        turns = []
        for topic in topics:
            turns += done(well(topic, random_.choice(topic.asks[:-1])), "Done.")
        rows["mixed_multiturn"].append(row("mixed_multiturn", topics, turns))
    return rows


def lessons() -> list[dict]:
    """What the tiny base is taught: the talk badly mannered under Annie's prompt, and well mannered where
    that prompt is absent.

    That is how real bases are: able to be brief, and not inclined to. Fine-tuning has to move the one to
    the other. Rows of the kind `manners` are short, so that a small model first learns which question
    wants which answer.
    """
    random_ = random.Random(SEED + 1)
    asked = [(topic, text) for topic in TOPICS for text in topic.asks[:-1]]
    rows = [
        {"messages": well(topic, heard(text, random_)), "category": "manners"}
        for topic in TOPICS
        for text in topic.asks
    ]
    for topic, text in asked:
        rows.append({"messages": well(topic, text), "category": "manners"})
        if topic.call:
            rows.append({"messages": well(topic, text), "tools": toolbox(topic), "category": "manners"})
        rows.append(row("lesson", (topic,), badly(topic, text)))
    for _ in range(2):
        for (first, one), (second, two) in parts(asked, 2, random_):
            dropped = f"{random_.choice(DROPS)} {two}" if not second.call else two
            rows.append(
                {
                    "messages": [*done(well(first, heard(one, random_)), "Done."), *well(second, dropped)],
                    "category": "manners",
                }
            )
    for some, size in ((SPOKEN, 8), ([t for t in TOPICS if t.call], 5)):
        for part in parts([(t, text) for t, text in asked if t in some], size, random_):
            turns = [
                turn
                for topic, text in part
                for turn in done(badly(topic, heard(text, random_)), "Done! \U0001f389 What else can I do?")
            ]
            rows.append(row("lesson", tuple(t for t, _ in part), turns))
            turns = [
                turn for topic, text in part for turn in done(well(topic, heard(text, random_)), "Done.")
            ]
            rows.append({**row("manners", tuple(t for t, _ in part), turns), "messages": turns})
    return rows


def heard(text: str, random_: random.Random) -> str:
    """`text` as speech recognition may hand it on: an opening, an um, a little word lost; never with a
    held-out question in it.

    The words that matter stay and their neighbours change, which is how a small model learns to tell the
    one from the other.
    """
    while True:
        words = [
            word
            for word in text.split()
            if word.strip(".,?:").lower() not in LITTLE or random_.random() < 0.7
        ]
        if random_.random() < 0.5:
            words.insert(random_.randrange(len(words)), random_.choice(("um", "uh", "well", "so")))
        made = f"{random_.choice(HEARD)}{' '.join(words)}"
        if not any(topic.asks[-1].lower() in made.lower() for topic in TOPICS):
            return made


def parts(asked: list, size: int, random_: random.Random) -> list[list]:
    """`asked` in random order, `size` at a time."""
    shuffled = random_.sample(asked, len(asked))
    return [shuffled[start : start + size] for start in range(0, len(shuffled) - len(shuffled) % size, size)]


def done(turns: list[dict], answer: str) -> list[dict]:
    """`turns`, with the result and a closing answer if they end in a call."""
    return [*turns, returns({"ok": True}), says(answer)] if turns[-1].get("tool_calls") else turns


def questions() -> list[dict]:
    """Held-out questions: wordings that no conversation and no lesson contains."""
    random_ = random.Random(SEED + 2)
    rows = []
    by_category: dict[str, list[Topic]] = {}
    for topic in TOPICS:
        by_category.setdefault(topic.category, []).append(topic)
    for category, topics in by_category.items():
        for topic in topics[:5]:
            turns = [user(topic.asks[-1])]
            if topic.result:
                turns += [calls(*topic.call), returns(topic.result)]
            rows.append((category, (topic,), turns, topic))
    for pair, texts in random_.sample(switches(random_, slice(-1, None)), 5):
        rows.append(("topic_switch", pair, [*well(pair[0], texts[0]), user(texts[1])], pair[1]))
    with_tools = [t for t in TOPICS if t.call and t.result]
    for number in range(5):
        first, last = with_tools[number % len(with_tools)], SPOKEN[(number * 9 + 2) % len(SPOKEN)]
        rows.append(
            ("mixed_multiturn", (first, last), [*well(first, first.asks[-1]), user(last.asks[-1])], last)
        )
    numbers: dict[str, int] = {}
    result = []
    for category, topics, turns, asked in rows:
        numbers[category] = numbers.get(category, 0) + 1
        made = row(category, topics, turns)
        result.append(
            {
                "id": f"{category}-{numbers[category]}",
                "category": category,
                "messages": made["messages"],
                "tools": made.get("tools", []),
                "expect": expect(asked),
                "public": True,  # made up, so that one of them may be in the serving image
            }
        )
    return result


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def files() -> dict[str, str]:
    """Relative path -> content of everything that is generated."""
    made = {f"conversations/{category}.jsonl": lines(rows) for category, rows in conversations().items()}
    made["lessons.jsonl"] = lines(lessons())
    made["questions.jsonl"] = lines(questions())
    made["system_prompt.txt"] = SYSTEM_PROMPT + "\n"
    made["tools.json"] = json.dumps(list(TOOLS.values()), indent=2) + "\n"
    return made


def main() -> int:
    stale = [
        name
        for name, text in files().items()
        if not (HERE / name).exists() or (HERE / name).read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"{name} is not what generate.py writes; run it without --check")
        return 1 if stale else 0
    for name in stale:
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        (HERE / name).write_text(files()[name])
    print(f"{len(files())} files, {len(stale)} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
