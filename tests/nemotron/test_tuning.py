"""The table of kernel configurations is whole, and on a GPU that it has nothing is searched for."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train environment")

from nemotron import tuning  # noqa: E402

GPUS = json.loads(tuning.TABLE.read_text())["gpus"]


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_of_the_table_has_a_configuration_that_triton_takes(gpu):
    assert len(tuning.table(gpu)) == 14
    for config in tuning.table(gpu).values():
        assert set(config) == {"arguments", "num_warps", "num_stages"}
        assert config["num_warps"] in (1, 2, 4, 8) and config["num_stages"] in range(1, 8)
        assert all(name.startswith("BLOCK_SIZE") and size & (size - 1) == 0 for name, size in config["arguments"].items())


def test_a_gpu_that_the_table_does_not_have_is_tuned_by_triton():
    assert tuning.table("a GPU of next year") == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_known_gpu_every_kernel_of_the_table_has_one_configuration():
    tuning.prepare()
    known = tuning.table(torch.cuda.get_device_name())
    found = {name: tuner.configs for name, tuner in tuning.tuners() if name in known}
    assert set(found) == set(known) and all(len(configs) == 1 for configs in found.values())
    assert {name: tuning.chosen()[name] for name in known} == known
