"""Several processes that train one model: each packs its share of a step's conversations, and gradients are
summed.

A sum is right, not a mean: every process has already divided by the trained tokens of the whole step. So the
gradient equals that of one process with all conversations, however they are divided.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # not at the top: the process that only starts torchrun need not load it


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world` processes."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which reports and writes."""
        return self.rank == 0

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Sums float32 tensors over all processes, in place and in one message."""
        if self.world == 1:
            return
        import torch

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def any(self, flag: bool, device: str) -> bool:
        """Whether the flag of any process is set; all get the same answer."""
        if self.world == 1:
            return flag
        import torch

        count = torch.tensor([float(flag)], device=device)
        self.sum([count])
        return bool(count.item())

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            from torch import distributed

            distributed.barrier()


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join(device: str) -> Ranks:
    """Joins the processes that torchrun started and returns this process's rank; a single rank without
    torchrun.
    """
    if not under_torchrun():
        return Ranks()
    import torch
    from torch import distributed

    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def torchrun_command(count: int, module: str, *words: str) -> list[str]:
    """The command that runs `module` in `count` processes on this machine."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *torchrun, "-m", module, *words]


def launch(count: int, job: str) -> None:
    """Replaces this process with torchrun, which runs stage train in `count` processes on this machine."""
    os.execv(sys.executable, torchrun_command(count, "stages.train", job))
