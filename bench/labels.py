"""Names the parts of a model in a profile: forward, recomputed and backward are separate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Labels:
    """While entered, every module of `parts` runs in a profiler range "<part> forward", "<part> recomputed"
    or "<part> backward".

    A checkpointed block runs again inside its own backward. The backward ranges that are open then are
    suspended meanwhile, so that no time counts twice. A part inside another one counts in both: name it
    "<outer>/<inner>".
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]]) -> None:
        self.parts = list(parts)
        self.names: set[str] = set()
        self.hooks: list[RemovableHandle] = []
        self.open: list[tuple[str, torch.profiler.record_function]] = []  # backward ranges
        # forward ranges, their kind, and the backward ranges each put on hold
        self.running: list[tuple[torch.profiler.record_function, str, list[str]]] = []

    def __enter__(self) -> Labels:
        for part, module in self.parts:
            self.hooks += [
                module.register_forward_pre_hook(lambda *_, part=part: self._begin(part)),
                # Also after the exception by which torch stops a recomputation early.
                module.register_forward_hook(lambda *_: self._end(), always_call=True),
                module.register_full_backward_pre_hook(lambda *_, part=part: self._open(f"{part} backward")),
                module.register_full_backward_hook(lambda *_: self._close() and None),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _range(self, name: str) -> torch.profiler.record_function:
        self.names.add(name)
        entered = torch.profiler.record_function(name)
        entered.__enter__()
        return entered

    def _open(self, name: str) -> None:
        self.open.append((name, self._range(name)))

    def _close(self) -> str:
        name, entered = self.open.pop()
        entered.__exit__(None, None, None)
        return name

    def _begin(self, part: str) -> None:
        suspended = [self._close() for _ in range(len(self.open))][::-1]
        outer = self.running[-1][1] if self.running else "forward"
        kind = "recomputed" if suspended else outer
        self.running.append((self._range(f"{part} {kind}"), kind, suspended))

    def _end(self) -> None:
        entered, _, suspended = self.running.pop()
        entered.__exit__(None, None, None)
        for name in suspended:
            self._open(name)
