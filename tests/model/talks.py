"""Messages and tools for the tests of conversations."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_timer",
            "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "You are Annie."}


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def calls(name, arguments, content=""):
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def tool(name, **parameters):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "It does so.",
            "parameters": {"type": "object", "properties": parameters},
        },
    }


def result(content, id=None, **more):
    return {"role": "tool", "content": content, **({"tool_call_id": id} if id else {}), **more}


def several(*calls_made, content=None):
    """A turn with several calls, each (name, arguments, id or None)."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                **({"id": id} if id else {}),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments, id in calls_made
        ],
    }
