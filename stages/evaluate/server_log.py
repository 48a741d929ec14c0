"""Reads from a vLLM server's log why it ended: the exception that stopped it, and what to do about it.

vLLM runs an API server and an engine as two processes. The engine's exception comes first. The API server
then ends with an exception that only refers to it. Every line may begin with the process (`(EngineCore pid=7)
`) and the logger's level, time and place.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

_PREFIX = re.compile(r"^(?:\([\w ]+ pid=\d+\) ?)?(?:[A-Z]+ \d\d-\d\d [\d:.]+ \[[^\]]+\] ?)?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?:: .+)?$")
_USAGE = re.compile(r"^\S.*: error: (.+)$")  # argparse
# What a vLLM process prints when one of its child processes has ended. It is never the cause.
_POINTS_BACK = (
    "root cause",
    "Engine process failed to start",
    "EngineDeadError",
    "CancelledError",
    "SystemExit",
)
_LONGEST = 3  # lines of a message

_REMEDIES = (
    (r"FP8 KV cache", "Set kv_cache: auto in the recipe: this machine has no FP8 KV cache."),
    (
        (
            r"(?i)out of memory|cannot allocate memory|bad_alloc|Free memory on device|No available memory"
            r" for the cache blocks"
        ),
        "Memory ran out: stop what else runs on this machine, or lower memory_share or concurrency.",
    ),
    (
        r"(?i)max.model.len|maximum model length|max seq len",
        "Lower max_model_len in the recipe, to what the model's config.json allows.",
    ),
    (
        r"(?i)safetensors|incomplete metadata|not enough data|Error while deserializing",
        "A weight file is torn: delete that artifact (build.py path STAGE prints its folder) and run again.",
    ),
    (r"Address already in use", "Another program took the port meanwhile: run again."),
    (
        r"(?i)cannot open shared object file|ImportError|ModuleNotFoundError",
        "The vllm environment is not whole: delete it (.annie/envs, or the image) and run again.",
    ),
)


@dataclass(frozen=True)
class Cause:
    """`text` is the server's exception in its own words, or the signal; `remedy` is what to do."""

    text: str
    remedy: str


def cause(lines: Sequence[str], code: int | None, memory_gb: float | None = None) -> Cause | None:
    """Why a server ended with exit status `code`, from the last lines of its log; None if the lines do not
    tell.

    The last exception counts, because an earlier one may have been caught. Exceptions that only refer to
    another process are skipped. `memory_gb` is the memory that was available when the server ended.
    """
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        available = f" ({memory_gb:.1f} GB are available now)" if memory_gb is not None else ""
        return Cause(
            "it was killed (signal 9)",
            f"Most often memory ran out{available}: stop what else runs on this machine, or lower"
            " memory_share.",
        )
    plain_lines = [_PREFIX.sub("", line, count=1) for line in lines]
    message = ""
    for number, line in enumerate(plain_lines):
        if usage := _USAGE.match(line):
            message = usage[1]
        elif _EXCEPTION.match(line) and not any(words in line for words in _POINTS_BACK):
            message = _message(plain_lines[number:])
    if not message:
        return None
    return Cause(message, next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, message)), ""))


def _message(lines: Sequence[str]) -> str:
    """The exception at the start of `lines`, with the lines that continue its message."""
    message = [lines[0]]
    for line in lines[1:_LONGEST]:
        if (
            not line.strip()
            or _EXCEPTION.match(line)
            or line.startswith(("Traceback", "The above", "During handling", "  File", "Process ", "sys:"))
        ):
            break
        if not line.startswith(" "):  # only indented lines continue a message, as pydantic writes them
            break
        message.append(line.strip())
    return " ".join(message)
