"""Calls of the hub that end in bounded time, whatever the server does.

huggingface_hub limits the wait for the next byte only. So a server that sends a byte a second, or asks for a
pause of a day, would hold it for ever. Here a call must bring bytes, and not many more than were announced.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from stages.job import StageError

T = TypeVar("T")

WINDOW = 360.0  # seconds; the pauses that the hub asks for because of its rate limits are at most 300
SLOWEST = 1024  # bytes a second, as the mean of a window
POLL = 0.1  # seconds
RESTARTS = 8  # times that a file may begin anew; huggingface_hub gives up after 5 errors in a row
ROOM = 2**20  # bytes of answers besides the file itself

_received = 0  # bytes of all answers so far


def count_bytes() -> None:
    """Counts what huggingface_hub receives. To be called before its first request."""
    import httpx2  # the HTTP library of huggingface_hub
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    class Counted(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream):
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            global _received
            for chunk in self.stream:
                _received += len(chunk)
                yield chunk

        def close(self) -> None:
            self.stream.close()

    def count(response: httpx2.Response) -> None:
        if (packing := response.headers.get("content-encoding", "identity")) != "identity":
            raise StageError(
                f"an answer of the hub is packed ({packing[:20]!a}), of unknown size",
                "an answer as it is, which was asked for",
                "Something between here and the hub changes answers: try another network.",
            )
        response.stream = Counted(cast(httpx2.SyncByteStream, response.stream))

    def client() -> httpx2.Client:
        counting = default_client_factory()
        counting.headers["Accept-Encoding"] = "identity"
        counting.event_hooks = {**counting.event_hooks, "response": [count]}
        return counting

    set_client_factory(client)


def within(subject: str, announced: int, on_disk: Callable[[], int], call: Callable[[], T]) -> T:
    """The result of `call`, which fetches `subject` of `announced` bytes. `on_disk` counts the bytes that
    arrived on another way than HTTP.

    Raises StageError if a window of time brings too few bytes, or if many more arrive than announced. Then
    the call goes on in its thread, which ends with the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    first = _received + on_disk()
    counted, since = first, time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(POLL)
        now = _received + on_disk()
        if now - first > RESTARTS * announced + ROOM:
            raise StageError(
                f"{now - first} bytes arrived for {subject}",
                f"the {announced} bytes that the hub announces",
                "Something between here and the hub changes files: try another network.",
            )
        if now - counted >= SLOWEST * WINDOW:
            counted, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > WINDOW:
            raise StageError(
                f"{subject}: {now - counted} bytes arrived in {WINDOW:.0f} seconds",
                f"at least {SLOWEST} bytes a second",
                "The hub or the network is too slow, or the hub asks to wait: run again later; what has"
                " arrived is kept.",
            )
    if errors:
        raise errors[0]
    return results[0]
