"""What a machine lacks is named before anything runs."""

from __future__ import annotations

import pytest
import toy

from forge import preflight
from forge.finding import Refused

GB10 = """\
MemTotal:       127535336 kB
MemFree:          1048576 kB
MemAvailable:    97656250 kB
"""


@pytest.mark.trap("memory-of-a-gb10")
def test_memory_comes_from_proc_meminfo(tmp_path):
    """A GB10's NVML has no memory figure; MemAvailable counts what caches would give back, MemFree does
    not.
    """
    (tmp_path / "meminfo").write_text(GB10)
    available, total = preflight.memory_gb(tmp_path / "meminfo")
    assert (round(available), round(total, 1)) == (100, 130.6)


@pytest.mark.parametrize(("need", "subject"), [("memory_gb: 90000", "slow"), ("disk_gb: 9000000", "disk")])
def test_too_little_of_something_is_named_with_its_remedy(mini, need, subject):
    toy.edit(mini.recipe, "minutes: 0.5", need)
    with pytest.raises(Refused) as refused:
        mini.run()
    finding = refused.value.findings[0]
    assert finding.subject == subject and finding.remedy
    assert not list(mini.home.glob("runs/*"))


def test_a_missing_gpu_is_named_where_the_recipe_wants_one(mini):
    toy.edit(mini.recipe, "seed: 3", "seed: 3\ngpu: cuda")
    toy.edit(mini.recipe, "minutes: 0.5", "gpu: true")
    with pytest.raises(
        Refused, match="no GPU that nvidia-smi can see; expected one, since the recipe says gpu: cuda"
    ):
        mini.run()


def test_a_missing_secret_is_named(mini):
    toy.edit(mini.recipe, "seed: 3", "seed: 3\nsecrets: {token: nowhere.txt}")
    with pytest.raises(Refused, match="secret token: found no file .*nowhere.txt"):
        mini.run()
