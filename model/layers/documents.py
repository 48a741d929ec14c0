"""Where the documents of one packed sequence begin and end.

Several conversations lie end to end in one sequence, so that a step has no padding. Nothing of a document may
reach the next one: not through attention, the convolution or the Mamba state. Every mixer gets these
boundaries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch


@dataclass(frozen=True)
class Documents:
    """`lengths`: tokens of each document, in order. The sequence (batch of 1) has exactly their sum of
    tokens.
    """

    lengths: tuple[int, ...]
    _tensors: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(
                f"a packed sequence needs documents of at least one token each, found lengths {self.lengths}"
            )

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First token of each document, and the token after its last."""
        ends = list(accumulate(self.lengths))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def offsets(self, device: torch.device | str) -> torch.Tensor:
        """First token of each document, and the end of the last: int32 (documents + 1,)."""
        return self._cached(
            "offsets", device, lambda: torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        )

    def index(self, device: torch.device | str) -> torch.Tensor:
        """Index of each token's document: int32 (tokens,)."""
        return self._cached(
            "index",
            device,
            lambda: torch.repeat_interleave(
                torch.arange(len(self.lengths), dtype=torch.int32), torch.tensor(self.lengths)
            ),
        )

    def position(self, device: torch.device | str) -> torch.Tensor:
        """Position of each token within its document: int32 (tokens,)."""
        return self._cached(
            "position",
            device,
            lambda: (
                torch.arange(self.tokens, dtype=torch.int32)
                - torch.repeat_interleave(self.offsets("cpu")[:-1], torch.tensor(self.lengths))
            ),
        )

    def _cached(
        self, name: str, device: torch.device | str, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        # Fifty layers use the same tensors: they are copied to the device once, and through pinned memory so
        # that nothing waits.
        key = (name, str(device))
        if key not in self._tensors:
            tensor = make()
            pinned = torch.device(device).type == "cuda"
            self._tensors[key] = (
                tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)
            )
        return self._tensors[key]
