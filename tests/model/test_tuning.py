"""The table of kernel configurations is whole, and on a GPU that it has nothing is searched for; on others
nothing is searched for twice.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from model.layers import kernel_cache, kernel_watch, tuning

GPUS = json.loads(tuning.TABLE.read_text())["gpus"]


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_of_the_table_has_a_configuration_that_triton_takes(gpu):
    assert len(tuning.configurations(gpu)) == 14
    for config in tuning.configurations(gpu).values():
        assert set(config) == {"arguments", "num_warps", "num_stages"}
        assert config["num_warps"] in (1, 2, 4, 8) and config["num_stages"] in range(1, 8)
        assert all(
            name.startswith("BLOCK_SIZE") and size & (size - 1) == 0
            for name, size in config["arguments"].items()
        )


def test_a_gpu_that_the_table_does_not_have_is_tuned_by_triton():
    assert tuning.configurations("a GPU of next year") == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_known_gpu_every_kernel_of_the_table_has_one_configuration():
    tuning.prepare()
    known = tuning.configurations(torch.cuda.get_device_name())
    found = {name: tuner.configs for name, tuner in tuning.tuners() if name in known}
    assert set(found) == set(known) and all(len(configs) == 1 for configs in found.values())
    assert {name: tuning.used_configurations()[name] for name in known} == known


# --- what searches found ------------------------------------------------------------------------------------


class StandIn:
    """A tuner as triton.runtime.Autotuner is one, as far as model/layers/tuning.py knows it: the fastest
    configuration for each key, once.
    """

    def __init__(self, seconds):
        self.configs = [
            SimpleNamespace(kwargs={"BLOCK_SIZE_M": size}, num_warps=4, num_stages=3, pre_hook=print)
            for size in seconds
        ]
        self.seconds, self.cache, self.searches = seconds, {}, 0

    def prune_configs(self, arguments):
        return self.configs

    def run(self, *key):
        if key not in self.cache:
            self.searches += 1
            self.cache[key] = min(
                self.prune_configs({}), key=lambda config: self.seconds[config.kwargs["BLOCK_SIZE_M"]]
            )
        self.best_config = self.cache[key]


def in_triton(seconds):
    """The same by Triton's own tuner, with a kernel and a clock that need no GPU."""
    triton = pytest.importorskip("triton", reason="no Triton here")
    from triton.runtime.autotuner import Autotuner

    class Counting(Autotuner):
        searches = property(lambda self: len(self.searched) // len(seconds))

    ran = []

    def body():
        pass

    kernel = SimpleNamespace(fn=body, run=lambda *_, BLOCK_SIZE_M, **__: ran.append(BLOCK_SIZE_M))

    def clock(call, quantiles):
        call()
        tuner.searched.add(ran[-1])
        return [seconds[ran[-1]]] * 3

    configs = [triton.Config({"BLOCK_SIZE_M": size}, pre_hook=lambda arguments: None) for size in seconds]
    tuner = Counting(kernel, ["size", "kind"], configs, ["size", "kind"], None, None, do_bench=clock)
    tuner.searched = set()
    return tuner


@pytest.fixture(params=[StandIn, in_triton])
def make(request, tmp_path, monkeypatch):
    """A tuner as a new process would find it, with what was remembered before; 32 is fastest."""
    monkeypatch.setattr(kernel_cache, "_prepared", tmp_path)
    monkeypatch.setattr(kernel_watch, "counts", kernel_watch.Counts())

    def fresh(name="scan", seconds=None):
        tuner = request.param(dict(seconds or {16: 3.0, 32: 1.0, 64: 2.0}))
        tuning.add_searches(tuner, tuning.read_searches().get(name, []))
        tuning.watch(name, tuner)
        return tuner

    return fresh


def test_what_one_process_found_the_next_does_not_search_for(make):
    make().run(128, "bf16")
    after = make(seconds={16: 1.0, 32: 2.0, 64: 3.0})  # it would choose otherwise
    after.run(128, "bf16")
    assert (
        after.searches == 0
        and after.best_config.kwargs == {"BLOCK_SIZE_M": 32}
        and after.best_config.pre_hook
    )
    assert kernel_watch.counts.tuned == 1


def test_another_size_or_dtype_is_searched_for_and_both_are_remembered(make):
    make().run(128, "bf16")
    second = make()
    second.run(128, "float32")
    assert second.searches == 1
    third = make()
    third.run(128, "bf16")
    third.run(128, "float32")
    assert third.searches == 0


def test_kernels_that_another_process_found_meanwhile_stay(make):
    """Two ranks tune at once; each writes what it found."""
    first, second = make("scan"), make("state")
    first.run(128, "bf16")
    second.run(128, "bf16")
    assert set(tuning.read_searches()) == {"scan", "state"}


def test_a_configuration_that_the_library_has_no_more_is_searched_for(make):
    make().run(128, "bf16")
    after = make(seconds={16: 3.0, 64: 2.0})
    after.run(128, "bf16")
    assert after.searches == 1 and after.best_config.kwargs == {"BLOCK_SIZE_M": 64}


def test_a_search_is_told_before_it_begins(make, monkeypatch):
    notes = []
    monkeypatch.setattr(kernel_watch, "_tell", notes.append)
    tuner = make()
    tuner.run(128, "bf16")
    tuner.run(128, "bf16")
    assert notes == ["tuning scan: 3 configurations are compiled and timed"]


def test_a_torn_memory_is_told_and_written_anew(make, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(kernel_watch, "_tell", notes.append)
    (tmp_path / "tuning.json").write_text('{"kernels": {"scan"')
    make().run(128, "bf16")
    assert "tuned anew" in notes[0] and list(tuning.read_searches()) == ["scan"]


def test_where_nothing_is_kept_every_process_searches(make, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_prepared", None)
    make().run(128, "bf16")
    after = make()
    after.run(128, "bf16")
    assert after.searches == 1 and tuning.read_searches() == {}


def test_a_run_without_the_scan_has_no_configurations_in_its_manifest():
    if not tuning.prepare.cache_info().currsize:
        assert tuning.for_manifest() == {}


def test_compilations_are_counted_and_told(monkeypatch):
    notes = []
    monkeypatch.setattr(kernel_watch, "_tell", notes.append)
    monkeypatch.setattr(kernel_watch, "counts", kernel_watch.Counts())
    kernel_watch._compiled(
        src=SimpleNamespace(name="scan"), metadata={}, metadata_group={}, times=None, cache_hit=False
    )
    kernel_watch._compiled(
        src=SimpleNamespace(name="scan"), metadata={}, metadata_group={}, times=None, cache_hit=True
    )
    assert (kernel_watch.counts.compiled, kernel_watch.counts.loaded) == (1, 1) and notes == ["compiled scan"]
