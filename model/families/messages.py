"""Messages and tools in the one form that is rendered: the form that a server passes to the chat template.

Rows, questions and requests all pass through `normalise` and `served_tools`, so the same conversation has the
same tokens wherever it is rendered. The template writes no call ids and escapes nothing; what it cannot
distinguish is refused here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from model.families import markup

ROLES = ("system", "user", "assistant", "tool")
# vLLM removes a line with this beginning from the start of a system prompt.
DROPPED_LINE = "x-anthropic-billing-header"

# A name stands in <function=NAME>, <parameter=NAME> or <name>NAME</name>, and vLLM's parser reads it back up
# to the first ">".
_NAME = re.compile(r"[^\s<>=](?:[^\n\r<>=]*[^\s<>=])?")

CALL_AS_TEXT = "a call written out as text, which belongs in tool_calls"


class ChatError(ValueError):
    """A conversation that cannot be rendered or trained on; the message is the reason."""


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` in the form that the template gets. The input stays as it is; a second call changes nothing.

    - `arguments` are mappings in their own key order; "", null and absent mean {}. Values stay what JSON made
      of them, so the template writes `true` as `True` and `1.0` as `1.0`, as a server does that renders the
      same history. Only null is refused as an argument: it would be trained as the word None, which no parser
      reads back as null.
    - Blanks around an assistant's text and thoughts are removed: the template trims them in some turns and
      keeps them in others, so a later turn would be trained on another history than the server sends. Other
      texts stay as they are.
    - The results of a turn's calls follow it, in the order of its calls. `tool_call_id` decides which is
      which; where no result has one, the order stands.
    - Keys whose value is null are left out (except `content`, which becomes "" where a turn only calls
      tools).

    Raises ChatError, with the position of the message (from 1), for any other shape.
    """
    if not messages:
        raise ChatError("no messages")
    result: list[dict[str, Any]] = []
    position = 0
    while position < len(messages):
        message = _message(messages[position], position + 1)
        result.append(message)
        position += 1
        if message["role"] == "tool":
            _refuse_written_call(result[:-1])
            raise ChatError(f"message {position} is a tool result, but the turn before it calls no tool")
        if calls := message.get("tool_calls"):
            end = position
            while (
                end < len(messages)
                and isinstance(messages[end], dict)
                and messages[end].get("role") == "tool"
            ):
                end += 1
            if end > position or end < len(messages):  # else the conversation ends with the calls
                result += _results(
                    calls, [_message(messages[n], n + 1) for n in range(position, end)], position
                )
            position = end
    return result


def _refuse_written_call(messages: list[dict[str, Any]]) -> None:
    """Names the cause if a result has no call because the turn before it contains the call as text."""
    last: dict[str, Any] = messages[-1] if messages else {}
    if last.get("role") == "assistant" and (written := markup.written_call(last["content"], [])):
        raise ChatError(f"message {len(messages)} holds {written}: {CALL_AS_TEXT}")


def _message(message: Any, position: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ChatError(f"message {position} is not an object")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"message {position} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    if role == "system" and position > 1:
        raise ChatError(f"message {position} is a second system prompt")
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if not isinstance(message.get("train", True), bool):
        raise ChatError(f"train of message {position} is neither true nor false")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise ChatError(f"tool_calls of message {position} is {type(calls).__name__}, not a list")
        if calls and role != "assistant":
            raise ChatError(f"message {position} calls a tool, but its role is {role}")
        message["tool_calls"] = [_call(call, position) for call in calls]
        if not calls:
            del message["tool_calls"]
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ChatError(
            f"content of message {position} is "
            f"{'null' if content is None else type(content).__name__}, not text"
        )
    if role == "system" and content.startswith(DROPPED_LINE):
        raise ChatError(
            f"message {position} begins with {DROPPED_LINE}: vLLM removes that line from a system prompt"
        )
    if role == "assistant":
        content = content.strip()
        if not content and not message.get("tool_calls"):
            raise ChatError(f"message {position} is an empty assistant turn")
        thoughts = message.pop("reasoning_content", "")
        if not isinstance(thoughts, str):
            raise ChatError(f"reasoning_content of message {position} is {type(thoughts).__name__}, not text")
        if thoughts := thoughts.strip():
            message["reasoning_content"] = thoughts
    message["content"] = content
    checked: dict[str, Any] = message
    return checked


def _call(call: Any, position: int) -> dict[str, Any]:
    """One entry of tool_calls: `id` if it has one, `type` and `function`, with arguments as a mapping."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise ChatError(f"message {position} has a tool call without a function name")
    if call.get("type", "function") != "function":
        raise ChatError(f"message {position} has a tool call of type {call['type']!r}, not function")
    name, arguments = function["name"], function.get("arguments")
    _check_name(name, f"message {position}: the function name of a call")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ChatError(f"message {position}: arguments of {name} are not JSON: {error}") from error
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not isinstance(arguments, dict):
        raise ChatError(
            f"message {position}: arguments of {name} are {type(arguments).__name__}, not an object"
        )
    for key, value in arguments.items():
        _check_name(key, f"message {position}: an argument name of {name}")
        if value is None:
            raise ChatError(f"message {position}: argument {key} of {name} is null: leave it out")
        if not _finite(value):
            raise ChatError(
                f"message {position}: argument {key} of {name} holds NaN or Infinity, which is no JSON"
            )
    identity = {"id": call["id"]} if call.get("id") not in (None, "") else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _check_name(name: Any, subject: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ChatError(
            f"{subject} is not a name that can be read back: no < > =, no line break, no blank at an end"
        )


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _results(
    calls: list[dict[str, Any]], results: list[dict[str, Any]], position: int
) -> list[dict[str, Any]]:
    """The results of one turn in the order of its calls; `position` is that of the turn that calls."""
    names = [call["function"]["name"] for call in calls]
    if len(results) != len(calls):
        raise ChatError(
            f"message {position} makes {len(calls)} tool calls, but {len(results)} results follow it"
        )
    ids = [result.get("tool_call_id") for result in results]
    if not any(ids):
        for number, (name, result) in enumerate(zip(names, results, strict=True), position + 1):
            if result.get("name", name) != name:
                raise ChatError(
                    f"message {number} is a result of {result['name']}, "
                    f"but the call in its place is of {name}"
                )
        return results
    call_ids = [call.get("id") for call in calls]
    if not all(call_ids):
        raise ChatError(
            f"results after message {position} have a tool_call_id, but not all of its calls have an id"
        )
    if not all(ids):
        raise ChatError(
            f"message {position + 1 + [bool(value) for value in ids].index(False)} has no tool_call_id, "
            "but other results of the turn have one"
        )
    if any(isinstance(value, dict | list) for value in [*call_ids, *ids]):
        raise ChatError(f"an id of the calls of message {position}, or of their results, is no text")
    for owner, values in (("calls", call_ids), ("results", ids)):
        if len(set(values)) < len(values):
            raise ChatError(f"two {owner} of message {position} have the same id")
    for number, value in enumerate(ids, position + 1):
        if value not in call_ids:
            raise ChatError(
                f"message {number} is the result of a call that message {position} does not make: "
                "its tool_call_id is unknown"
            )
    return [results[ids.index(value)] for value in call_ids]


def served_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """`tools` in the form that vLLM 0.32 passes to the template (ChatCompletionToolsParam,
    FunctionDefinition).

    A bare function is wrapped. A function has `name`, `description` and `parameters`, null if absent, and
    `strict` and `defer_loading` if they are set; other keys are dropped. A null description is rendered as
    the word None, as a server does for a tool without one. A second call changes nothing, and neither does
    the server.

    Raises ChatError, with the name or position (from 1), for an entry that is no function or has values of
    other types.
    """
    if tools is not None and not isinstance(tools, list):
        raise ChatError(f"tools are {type(tools).__name__}, not a list")
    return [_tool(tool, position) for position, tool in enumerate(tools or [], 1)]


def _tool(tool: Any, position: int) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatError(f"tool {position} is not a function with a name")
    name = function["name"]
    if tool.get("type", "function") != "function":
        raise ChatError(f"tool {name} is of type {tool['type']!r}, not function")
    _check_name(name, f"the name of tool {position}")
    served = {
        "name": name,
        "description": function.get("description"),
        "parameters": function.get("parameters"),
    }
    if not isinstance(served["description"], str | None):
        raise ChatError(f"description of tool {name} is {type(served['description']).__name__}, not text")
    if not isinstance(served["parameters"], dict | None):
        raise ChatError(f"parameters of tool {name} are {type(served['parameters']).__name__}, not an object")
    for key in ("strict", "defer_loading"):
        value = function.get(key)
        if key == "defer_loading" and value is None:
            value = tool.get(key)
        if not isinstance(value, bool | None):
            raise ChatError(f"{key} of tool {name} is {type(value).__name__}, neither true nor false")
        if value is not None:
            served[key] = value
    return {"type": "function", "function": served}
