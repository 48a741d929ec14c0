"""The order in which rows are trained on."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


class ByLength(torch.utils.data.Sampler):
    """Rows of like length side by side, shuffled anew each epoch in a way that follows from seed and epoch alone.

    transformers' own LengthGroupedSampler draws from the global generator when an epoch begins, so a run that is resumed
    in the middle of its second epoch goes on with other batches than the one that was killed.
    """

    def __init__(self, lengths: list[int], step: int, seed: int):
        """`lengths`: tokens of each row; `step`: rows of one optimiser step."""
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch  # accelerate's data loader calls this as every epoch begins

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        return iter(get_length_grouped_indices(self.lengths, self.step, generator=torch.Generator().manual_seed(self.seed + self.epoch)))
