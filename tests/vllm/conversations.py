"""A hundred conversations as people's files have them: every format, message, tool and argument.

Each kind makes rows from a seeded generator. `as_sent` says that a client may send the row to the API as it
stands.
"""

import json
import random

WORDS = [
    "Mysuru",
    "ಹಾಯ್ ಬೆಂಗಳೂರು",
    "cafe\u0301",
    "naïve",
    "👩‍🚀",
    "שלום",
    "line\u2028separator",
    "a\u00a0b",
    "5 < 6 > 4",
    '{"a": 1}',
    "<b>bold</b>",
    "100 %",
    "\\n",
    "'quoted'",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City."}},
            "required": ["city"],
        },
    },
}
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Start a timer.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer"}},
            "required": ["minutes"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time."}}


def text(chance):
    return f"{' '.join(chance.choices(WORDS, k=chance.randint(1, 5)))} {chance.randint(0, 10**9)}"


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, id=None):
    return {
        **({"id": id} if id else {}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def asked(chance, *answers, system=True):
    """A question, and the messages after it."""
    start = [message("system", f"You are Annie. {text(chance)}")] if system else []
    return [*start, message("user", text(chance)), *answers]


def called(chance, calls, results, before=None):
    return asked(
        chance, message("assistant", before, tool_calls=calls), *results, message("assistant", text(chance))
    )


def result(content, id=None):
    return message("tool", content, **({"tool_call_id": id} if id else {}))


def several(chance, **options):
    turns = asked(chance, **options)
    for _ in range(chance.randint(1, 3)):
        turns += [message("assistant", text(chance)), message("user", text(chance))]
    return [*turns, message("assistant", text(chance))]


def with_tool(chance, tool, **arguments):
    name = tool.get("function", tool)["name"]
    return {
        "messages": called(chance, [call(name, json.dumps(arguments), "c1")], [result(text(chance), "c1")]),
        "tools": [tool],
    }


def function(**more):
    return {"type": "function", "function": {**TIMER["function"], **more}}


def without(tool, key):
    return {
        "type": "function",
        "function": {name: value for name, value in tool["function"].items() if name != key},
    }


# Kinds that a client may send as they stand.
def plain(chance):
    return {"messages": asked(chance, message("assistant", text(chance)))}


def many_turns(chance):
    return {"messages": several(chance)}


def blanks_and_line_breaks_of_others(chance):
    blank = chance.choice([" ", "\r\n", "\n\n", "\t"])
    return {
        "messages": [
            message("system", f"{blank}One.\r\nTwo.{blank}"),
            message("user", f"{blank}{text(chance)}\r\n\r\nMore{blank}"),
            message("assistant", f"A\r\nb {text(chance)}"),
            message("user", blank),
            message("assistant", text(chance)),
        ]
    }


def one_call(chance):
    return with_tool(chance, WEATHER, city=text(chance))


def call_with_words_then_more_turns(chance):
    row = {
        "messages": called(chance, [call("set_timer", '{"minutes": 5}', "a")], [result("ok", "a")], "Sure."),
        "tools": [TIMER],
    }
    row["messages"] += [message("user", text(chance)), message("assistant", text(chance))]
    return row


def parallel_calls(chance):
    cities = [text(chance) for _ in range(chance.randint(2, 4))]
    calls = [call("get_weather", json.dumps({"city": city}), f"id{n}") for n, city in enumerate(cities)]
    return {
        "messages": called(chance, calls, [result(text(chance), f"id{n}") for n in range(len(cities))]),
        "tools": [WEATHER, TIMER],
    }


def no_arguments(chance):
    return {
        "messages": called(chance, [call("get_time", chance.choice(["", "{}"]), "c")], [result("noon", "c")]),
        "tools": [CLOCK],
    }


def typed_arguments(chance):
    arguments = {
        "loud": True,
        "factor": 1.0,
        "tiny": 1e-7,
        "count": 10**18,
        "stops": ["Mysuru", {"at": None}],
        "home": {"city": "ಮೈಸೂರು", "far": False},
        "note": "two\nlines",
        "empty": "",
        "framed": "\n x \n",
        "none": [],
        "number": "5",
    }
    types = {bool: "boolean", float: "number", int: "integer", list: "array", dict: "object", str: "string"}
    keys = chance.sample(list(arguments), 6)
    properties = {key: {"type": types[type(arguments[key])]} for key in keys}
    tool = function(parameters={"type": "object", "properties": properties})
    return with_tool(chance, tool, **{key: arguments[key] for key in keys})


def tool_without_description(chance):
    return with_tool(chance, without(TIMER, "description"), minutes=chance.randint(1, 99))


def tool_with_further_keys(chance):
    more = chance.choice(
        [
            {"strict": True},
            {"strict": False, "defer_loading": True},
            {"strict": None, "x-vendor": {"a": 1}},
            {"examples": ["x"], "description": None},
        ]
    )
    return with_tool(chance, {**function(**more), "vendor": "x"}, minutes=3)


def tool_with_a_deep_schema(chance):
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "additionalProperties": False,
        "required": ["minutes"],
        "type": "object",
        "title": text(chance),
        "properties": {
            "minutes": {
                "description": " how long ",
                "minimum": 1,
                "type": ["integer", "null"],
                "default": None,
            },
            "unit": {"enum": ["s", "min"]},
            "at": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "anyOf": [{"required": ["place"]}],
            },
            "any": True,
            "ref": {"$ref": "#/x"},
        },
    }
    return with_tool(chance, function(parameters=schema), minutes=3)


def tool_without_parameters(chance):
    tool = chance.choice(
        [
            CLOCK,
            {**CLOCK, "function": {**CLOCK["function"], "parameters": None}},
            {**CLOCK, "function": {**CLOCK["function"], "parameters": {}}},
        ]
    )
    return with_tool(chance, tool)


def content_in_parts(chance):
    parts = [{"type": "text", "text": text(chance)} for _ in range(chance.randint(1, 3))]
    row = with_tool(chance, TIMER, minutes=4)
    row["messages"][1]["content"] = parts
    row["messages"][3]["content"] = [{"type": "text", "text": text(chance)}]
    return row


def answers_in_a_row(chance):
    return {
        "messages": asked(
            chance,
            message("assistant", text(chance)),
            message("assistant", text(chance)),
            message("user", text(chance)),
            message("user", text(chance)),
            message("assistant", text(chance)),
        )
    }


# Kinds that stage data has to bring into form.
def no_system_prompt(chance):
    return {"messages": several(chance, system=False)}


def blanks_around_answers(chance):
    row = {
        "messages": called(
            chance, [call("set_timer", {"minutes": 5}, "c1")], [result("ok", "c1")], "  Sure.\n"
        ),
        "tools": [TIMER],
    }
    row["messages"] += [message("user", text(chance)), message("assistant", f"\n {text(chance)}\u2003")]
    return row


def results_in_another_order(chance):
    calls = [call("get_weather", {"city": city}, city) for city in ("Pune", "Delhi", "Goa")]
    results = [
        result(f"{n} C", city) for n, city in zip((31, 40, 29), ("Pune", "Delhi", "Goa"), strict=False)
    ]
    chance.shuffle(results)
    return {"messages": called(chance, calls, results), "tools": [WEATHER]}


def bare_function(chance):
    return with_tool(chance, without(TIMER, chance.choice(["description", "none"]))["function"], minutes=7)


def developer(chance):
    return {"messages": [message("developer", text(chance)), *several(chance, system=False)]}


def thoughts(chance):
    row = {"messages": several(chance)}
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            turn[chance.choice(["reasoning", "reasoning_content"])] = text(chance)
    return row


def left_out_of_the_loss(chance):
    row = {"messages": several(chance)}
    row["messages"][2] |= chance.choice([{"weight": 0}, {"train": False}])
    return row


def older_calls(chance):
    return {
        "messages": asked(
            chance,
            message("assistant", None, function_call={"name": "set_timer", "arguments": '{"minutes": 5}'}),
            {"role": "function", "name": "set_timer", "content": "ok"},
            message("assistant", text(chance)),
        ),
        "functions": [TIMER["function"]],
    }


def share_gpt(chance):
    turns = [{"from": "system", "value": text(chance)}]
    for _ in range(chance.randint(1, 3)):
        turns += [{"from": "human", "value": text(chance)}, {"from": "gpt", "value": text(chance)}]
    return {"conversations": turns}


def share_gpt_with_tools(chance):
    return {
        "conversations": [
            {"from": "human", "value": text(chance)},
            {
                "from": "function_call",
                "value": json.dumps({"name": "set_timer", "arguments": {"minutes": 5}}),
            },
            {"from": "observation", "value": text(chance)},
            {"from": "gpt", "value": text(chance)},
        ],
        "system": text(chance),
        "tools": json.dumps([TIMER["function"]]),
    }


def alpaca(chance):
    return {
        "instruction": text(chance),
        "input": chance.choice(["", text(chance)]),
        "output": text(chance),
        "history": [[text(chance), text(chance)]],
    }


AS_SENT = (
    plain,
    many_turns,
    blanks_and_line_breaks_of_others,
    one_call,
    call_with_words_then_more_turns,
    parallel_calls,
    no_arguments,
    typed_arguments,
    tool_without_description,
    tool_with_further_keys,
    tool_with_a_deep_schema,
    tool_without_parameters,
    content_in_parts,
    answers_in_a_row,
)
BROUGHT_INTO_FORM = (
    no_system_prompt,
    blanks_around_answers,
    results_in_another_order,
    bare_function,
    developer,
    thoughts,
    left_out_of_the_loss,
    older_calls,
    share_gpt,
    share_gpt_with_tools,
    alpaca,
)


def hundred(seed=7):
    """(kind's name, row, whether a client may send it as it stands), four of each of the 25 kinds."""
    chance = random.Random(seed)
    return [
        (kind.__name__, kind(chance), kind in AS_SENT)
        for kind in (*AS_SENT, *BROUGHT_INTO_FORM)
        for _ in range(4)
    ]
