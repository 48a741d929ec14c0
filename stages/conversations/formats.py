"""Turns a row of any readable format into canonical messages (docs/formats.md has the table of formats and
keys).

Canonical messages have these keys: `role`, one of messages.ROLES; `content`, a string, or None on an
assistant turn that calls tools; `tool_calls`, a list of `{"id"?, "type": "function", "function": {"name",
"arguments": mapping}}`; `tool_call_id` and `name` on a tool's message; `reasoning_content` on an assistant
turn; `train: False` on any message. All other keys are dropped. A key with the value null counts as absent. A
key with content that cannot be represented is refused by name; other keys are listed in `unused`.
messages.normalise checks later whether the messages make a conversation (order, results of calls, empty
turns), for every source of messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.families.messages import ROLES, ChatError
from stages import dataset

# The names of messages.ROLES, OpenAI's developer and function, and the names of ShareGPT.
ROLE = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "ipython": "tool",
}
# ShareGPT's turns that only hold a call.
CALLS = {"function_call", "function-call", "tool_call", "tool-call"}
SHAPES = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}',
    '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}',
    '{"instruction": "Say hello.", "input": "", "output": "Hello."}',
)
NO_FORMAT = "no format that is read"  # start of the reason if no format matches the row's keys
FOREIGN_SHAPES = (
    ({"chosen", "rejected"}, "preference pairs"),
    ({"prompt", "completion"}, "a prompt and its completion"),
    ({"question", "answer"}, "a question and its answer"),
    ({"prompt", "response"}, "a prompt and its response"),
    ({"instruction", "response"}, "an instruction and its response"),
    ({"contents"}, "Gemini's contents"),
    ({"custom_id", "body"}, "requests of a batch API"),
    ({"text"}, "plain text"),
)
MEDIA = ("audio", "audios", "image", "images", "video", "videos", "file", "files", "attachments", "documents")
FLAGS = (
    "loss",
    "loss_mask",
    "mask",
    "masked",
    "learn",
    "ignore",
    "no_train",
    "trainable",
    "training",
    "train_on_turn",
    "train_detail",
    "training_detail",
)
REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that are not reported as unused: id and index only name the row, rows.py reads the other two.
SILENT = {"id", "index", "category", "split"}
HISTORY = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Conversation:
    """A row in canonical form. `tools` is the row's own value (a list, or None). `unused` lists keys that
    were not used, such as `messages[].name`.
    """

    format: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    unused: tuple[str, ...] = ()


def canonical(row: Any) -> Conversation:
    """The conversation of a row in any readable format. Raises ChatError with the reason, which begins with
    NO_FORMAT if no format matches.
    """
    if not isinstance(row, dict):
        raise ChatError(f"{NO_FORMAT}: the row is {_kind_name(row)}, not an object")
    row = _without_nulls(row)
    if key := next((key for key in HISTORY if key in row), ""):
        turns = _decode(row[key], key)
        if not isinstance(turns, list) or not turns:
            raise ChatError(f"{key} is {_kind_name(turns) if turns else 'empty'}, not a list of messages")
        form = "ShareGPT" if isinstance(turns[0], dict) and "from" in turns[0] else "messages"
        used = {key, "system", "tools", "functions"}
    elif "instruction" in row and "output" in row:
        form = "Alpaca"
        turns = _alpaca(row)
        used = {"instruction", "input", "output", "history", "system", "tools", "functions"}
    else:
        raise ChatError(f"{NO_FORMAT}: {_shape_text(row)}")
    unused = _unused_keys(row, used, "")
    messages = []
    for position, turn in enumerate(turns, 1):
        message, names = _message(turn, position)
        messages.append(message)
        unused += [f"{key or 'history'}[].{name}" for name in names]
    messages = _with_system(row.get("system"), messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ChatError("no assistant turn: nothing to train on")
    return Conversation(form, messages, _tools(row), tuple(dict.fromkeys(unused)))


def _message(turn: Any, position: int) -> tuple[dict[str, Any], list[str]]:
    """A message in canonical form, and its unused keys."""
    if not isinstance(turn, dict):
        raise ChatError(f"message {position} is {_kind_name(turn)}, not an object")
    turn = _without_nulls(turn)
    where = f"message {position}"
    names = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    role = turn.get(names[0])
    used = {*names, "weight", "train"}
    if isinstance(role, str) and role in CALLS:
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": _sharegpt_calls(turn.get(names[1]), where),
            **_train_flag(turn, "assistant", where),
        }, _unused_keys(turn, used, where)
    if not isinstance(role, str) or role not in ROLE:
        raise ChatError(f"{where} has the unknown role {role!r}; known are {', '.join(ROLE)}")
    message: dict[str, Any] = {"role": ROLE[role], "content": _content_text(turn.get(names[1]), where)}
    calls = _calls(turn, message["role"], where)
    if calls:
        message["tool_calls"] = calls
    used |= {"tool_calls", "function_call"}
    if message["role"] == "tool":
        message |= {
            key: _require_text(turn[key], key, where) for key in ("tool_call_id", "name") if key in turn
        }
        used |= {"tool_call_id", "name"}
    if thought := _reasoning(turn, where):
        if message["role"] != "assistant":
            raise ChatError(f"{where} of role {role} has reasoning, which only an assistant's may have")
        message["reasoning_content"] = thought
    used |= set(REASONING)
    return message | _train_flag(turn, message["role"], where), _unused_keys(turn, used, where)


def _content_text(value: Any, where: str) -> str | None:
    """Content as one string. Parts are joined with a newline, as the server joins them."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ChatError(f"content of {where} is {_kind_name(value)}, not text")
    parts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise ChatError(
                f"content of {where} has a part of type {kind!r}, which is not text"
                if kind != "text"
                else f"content of {where} has a part without text"
            )
        parts.append(text)
    return "\n".join(parts)


def _calls(turn: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """The calls of a message, from either of OpenAI's two forms."""
    calls, older = _decode(turn.get("tool_calls") or [], "tool_calls"), turn.get("function_call")
    if not isinstance(calls, list):
        raise ChatError(f"tool_calls of {where} is {_kind_name(calls)}, not a list")
    if (calls or older is not None) and role != "assistant":
        raise ChatError(f"{where} of role {role} calls a tool, which only an assistant's may")
    if calls and older is not None:
        raise ChatError(f"{where} has both tool_calls and function_call")
    if older is not None:
        calls = [{"function": _decode(older, "function_call")}]
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ChatError(f"{where} has a tool call without a function name")
    if call.get("type") not in (None, "function"):
        raise ChatError(f"{where} calls a tool of type {call['type']!r}, not function")
    id = {"id": _require_text(call["id"], "the id of a call", where)} if call.get("id") is not None else {}
    return {
        **id,
        "type": "function",
        "function": {"name": function["name"], "arguments": _arguments(function)},
    }


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as a mapping. Absent, null and blank arguments are {}, as for the server. Nulls
    inside the mapping stay, and chat refuses them.
    """
    name, value = function["name"], function.get("arguments", function.get("parameters"))
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            value = dataset.parse(value)
        except ValueError as error:
            raise ChatError(f"arguments of {name} are {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ChatError(f"arguments of {name} are {_kind_name(value)}, not an object")
    return value


def _sharegpt_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a ShareGPT turn, whose text is a JSON object or a list of them."""
    calls = _decode(value, f"the call of {where}")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise ChatError(f"{where} is a call, and names none")
    return [_call(call, where) for call in calls]


def _reasoning(turn: dict[str, Any], where: str) -> str:
    """The reasoning of a message, or ""."""
    texts = [turn[key] for key in REASONING if key in turn]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError(f"reasoning of {where} is not text")
    thoughts: set[str] = {text for text in texts if text.strip()}
    if len(thoughts) > 1:
        raise ChatError(f"{where} has two different texts of reasoning")
    return next(iter(thoughts), "")


def _train_flag(turn: dict[str, Any], role: str, where: str) -> dict[str, bool]:
    """`{"train": False}` if the message is excluded from the loss, else {}."""
    flags = set()
    if "weight" in turn:
        weight = turn["weight"]
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ChatError(
                f"weight of {where} is {_value_text(weight)}: 0 leaves it out of the loss, 1 trains it, and"
                " nothing else is known"
            )
        flags.add(weight == 1)
    if "train" in turn:
        if not isinstance(turn["train"], bool):
            raise ChatError(f"train of {where} is {_value_text(turn['train'])}, not true or false")
        flags.add(turn["train"])
    if len(flags) > 1:
        raise ChatError(f"weight and train of {where} contradict each other")
    if True in flags and role != "assistant":
        raise ChatError(f"{where} of role {role} is flagged to be trained; only an assistant's tokens are")
    return {"train": False} if False in flags else {}


def _unused_keys(mapping: dict[str, Any], used: set[str], where: str) -> list[str]:
    """The keys of a row or message that no rule uses. Raises ChatError with the key if it holds content, or
    if it may be an unknown training flag.
    """
    rest = []
    of = f" of {where}" if where else ""
    for key in mapping:
        if key in used or key in SILENT:
            continue
        value = mapping[key]
        if key == "refusal" and value:
            raise ChatError(f"refusal{of} holds text: put it into content if it is to be trained")
        if key in MEDIA and value:
            raise ChatError(f"{key}{of} is not text, which is all that is trained")
        if key in FLAGS:
            raise ChatError(
                f"{key}{of} may be a flag of what is trained, and is not known; known are weight and train,"
                " on a message"
            )
        if not where and key in ("weight", "train"):
            raise ChatError(f"{key} stands on the row; known it is on a message alone")
        if (
            where
            and key
            in (
                "tool_calls",
                "function_call",
                "tool_call",
                "tool_use",
                "function_calls",
                "text",
                "content",
                "value",
                "parts",
            )
            and value
        ):
            raise ChatError(f"{key}{of} is not known in this place")
        rest.append(key)
    return rest


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of an Alpaca row: the instruction with its input on the next lines, and the output. `history`
    holds earlier pairs of the two.
    """
    parts = {key: row.get(key, "") for key in ("instruction", "input", "output")}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise ChatError(f"{key} is {_kind_name(value)}, not text")
    history = _decode(row.get("history") or [], "history")
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ChatError("history is not a list of pairs of instruction and output")
    question = "\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    pairs = [*history, [question, parts["output"]]]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=False)
    ]


def _with_system(system: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the row's own `system` in front, unless they already have a system prompt."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ChatError(f"system is {_kind_name(system)}, not text")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ChatError("system and the first message are two different system prompts")
    return messages


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """The row's tools as a list, from `tools` or the older `functions`, which may be JSON in a string; None
    if it has none.
    """
    if row.get("tools") and row.get("functions"):
        raise ChatError("the row has both tools and functions")
    key = "tools" if row.get("tools") else "functions"
    tools = _decode(row.get(key) or [], key)
    if not isinstance(tools, list):
        raise ChatError(f"{key} is {_kind_name(tools)}, not a list of functions")
    return [_decode(tool, key) for tool in tools] or None


def _decode(value: Any, subject: str) -> Any:
    """`value`, or the value of its JSON if it is text: tables hold nested values as text."""
    if not isinstance(value, str):
        return value
    try:
        return dataset.parse(value) if value.strip() else []
    except ValueError as error:
        raise ChatError(f"{subject} is text that is {error}") from error


def _without_nulls(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _require_text(value: Any, subject: str, where: str) -> str:
    if not isinstance(value, str):
        raise ChatError(f"{subject} of {where} is {_kind_name(value)}, not text")
    return value


def _shape_text(row: dict[str, Any]) -> str:
    for keys, shape in FOREIGN_SHAPES:
        if keys <= set(row):
            return f"{shape} ({', '.join(sorted(keys))})"
    return f"the keys are {', '.join(map(repr, list(row)[:8])) or 'none at all'}"


def _kind_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _value_text(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str)) else _kind_name(value)


assert set(ROLE.values()) == set(ROLES)
