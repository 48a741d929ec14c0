"""Weights that several processes hold between them, over gloo, against the same held by one."""

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from model.layers.projection import Projection
from model.weights import nf4, nvfp4
from model.weights.shards import Shards

EXPERTS, OUT, INSIDE = 5, 7, 64


def stack(form, shards):
    torch.manual_seed(0)
    its = Projection(EXPERTS, OUT, INSIDE, form, torch.float32, "cpu", shards)
    for expert in range(EXPERTS):
        its.put(expert, torch.randn(OUT, INSIDE))
    return its


def process(rank, count, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    for form in ("bf16", "nf4", "nvfp4"):
        alone, shared = stack(form, Shards()), stack(form, Shards(rank, count))
        assert torch.equal(shared.dense(), alone.dense()), form
        assert shared.weight.numel() * count < alone.weight.numel() * 1.5, (
            "each process holds its share alone"
        )
    distributed.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_what_processes_hold_between_them_is_what_one_would_hold(count, tmp_path):
    """35 rows, which neither 2 nor 3 divides: a process's share ends within a matrix."""
    multiprocessing.spawn(process, (count, str(tmp_path)), count)


def test_a_share_of_the_rows_is_packed_as_the_whole_matrix_is():
    """NVFP4 has one scale a matrix: a process that holds part of it has the scale of the whole."""
    alone, first = stack("nvfp4", Shards()), stack("nvfp4", Shards(0, 2))
    assert torch.equal(first.weight, alone.weight[:18]) and torch.equal(
        first.weight_scale_2, alone.weight_scale_2
    )
    assert isinstance(alone.stored_weights(), nvfp4.Packed) and isinstance(
        stack("nf4", Shards()).stored_weights(), nf4.Packed
    )
