"""What a machine lacks is named before anything runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import toy

from forge import lock, plan, preflight, run
from forge.executor import Neighbour
from forge.executor.docker import Docker
from forge.executor.local import Local
from forge.finding import Refused
from forge.report import size
from product import serving_record

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


SPARK = (100.0, 130.6)
SERVER = Neighbour("annie-vllm-1", "the served model", 54.0)


@pytest.mark.parametrize(
    ("needed", "neighbours", "room"),
    [
        (100.0, [], True),
        (100.1, [], False),  # others hold it
        (76.6, [SERVER], True),
        (76.7, [SERVER], False),  # a server that has just started may take it yet
        (30.0, [SERVER, replace(SERVER, memory_gb=46.7)], False),
    ],
)
def test_a_stage_has_room_beside_what_is_held_and_what_may_be_taken(
    tmp_path, monkeypatch, needed, neighbours, room
):
    monkeypatch.setattr(preflight, "memory_gb", lambda: SPARK)
    finding = preflight.memory_finding("train", needed, tmp_path, neighbours)
    assert (finding is None) == room
    if finding:
        assert "100.0 GB of memory available of 130.6 GB" in finding.found
        assert finding.expected == size(needed * 1e9)
        assert ("the served model (annie-vllm-1) up to 54 GB" in finding.found) == bool(neighbours)


def test_the_remedy_names_what_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_gb", lambda: (1.0, 2.0))

    def remedy(*neighbours):
        return preflight.memory_finding("train", 90, tmp_path, list(neighbours)).remedy

    assert remedy() == "Take a smaller recipe, or a machine with more memory."
    monkeypatch.setattr(preflight, "memory_gb", lambda: (1.0, 128.0))
    assert remedy().startswith("Stop what else is running")
    assert "docker stop annie-vllm-1" in remedy(SERVER)
    (tmp_path / serving_record.FILE).touch()
    assert "python build.py serve --stop" in remedy(SERVER) and "serve --stop" in remedy()


def test_a_stage_whose_memory_was_taken_since_the_run_began_does_not_start(mini, monkeypatch):
    """The next run goes on there; what comes back in time is waited for."""
    asked, real = [], preflight.memory_gb

    def memory():
        asked.append(len(mini.events))
        busy = any(event.get("stage") == "count" for event in mini.events)
        return (0.05, 24.0) if busy and len(asked) < until else real()

    monkeypatch.setattr(preflight, "memory_gb", memory)
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: None)
    until = 1000
    assert mini.run().code == 1
    failed = mini.event("failed")
    assert (failed["stage"], failed["found"]) == ("slow", "50.0 MB of memory available of 24.0 GB")
    until = len(asked) + 8
    assert mini.run().ran == ("slow",)


def test_what_a_killed_run_left_is_ended_before_memory_is_looked_at(mini):
    class Containers(Local):
        """Holds a container of a killed run, as an engine would."""

        left = True

        def neighbours(self):
            return [replace(SERVER, memory_gb=1e6)] if self.left else []

        def end_orphans(self):
            self.left = False

    executor = Containers(mini.repo, mini.home)
    assert [f.subject for f in run.lacking(mini.context(), executor, mini.plan())][:1] == ["words"]
    assert run.run(mini.context(), executor, plan.Selection(last="words"), mini.events.append).code == 0


def test_what_a_killed_run_left_is_warned_of_and_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_gb", lambda: (40.0, 130.6))
    left = Neighbour("annie-train", "stage train", 60.0, orphan=True)

    def level(needed, *neighbours):
        finding = preflight.memory_finding("train", needed, tmp_path, list(neighbours))
        return finding and (finding.level, "A killed run left annie-train" in finding.remedy)

    assert level(40.0, left) is None  # its limit is no matter
    assert level(90.0, left) == ("warning", True)
    assert level(100.1, left) == ("error", False)  # other programs hold the rest
    assert level(90.0, left, SERVER) == ("error", False)


def test_the_containers_of_a_store_whose_lock_is_free_are_those_of_a_killed_run(mini, monkeypatch):
    """Containers as docker's client shows them."""
    executor, other = Docker(mini.repo, mini.home), str(mini.home / "other")
    host = {"HostConfig": {"Memory": 10**9, "DeviceRequests": None}}
    shown = [
        SimpleNamespace(name=name, labels={"io.annie.stage": "slow", "io.annie.home": home}, attrs=host)
        for name, home in (("ours", str(executor.home)), ("theirs", other))
    ]
    containers = SimpleNamespace(
        list=lambda filters, **options: [each for each in shown if filters["label"] in each.labels]
    )
    monkeypatch.setattr("forge.executor.docker.no_engine", lambda: None)
    monkeypatch.setattr(executor, "_client", SimpleNamespace(containers=containers))
    assert {each.container: each.orphan for each in executor.neighbours()} == {"ours": True, "theirs": False}
    with lock.held(mini.home / "store/lock", False, print):  # a run is under way, and waits for its stage
        assert not any(each.orphan for each in executor.neighbours())


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
