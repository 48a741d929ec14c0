"""Real disks that give out: a quota, a full disk, no inodes, read-only from the start. Each time there is one
clear sentence, and the next run goes on.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import toy
from click.testing import CliRunner

import build

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
READING = [["plan"], ["status"], ["logs", "slow"], ["verify"], ["doctor"], ["ls"], ["gc"]]
ROOM = 24_000_000  # bytes; more than the toy's runs take


def mount(*words):
    if not shutil.which(words[0]) or subprocess.run(words, capture_output=True).returncode:
        pytest.skip(f"this machine cannot do: {' '.join(map(str, words))}")


class Quota:
    """A subvolume of btrfs, whose quota holds for root too."""

    says = ("the quota of root",)

    def __init__(self, home):
        self.home, image, self.disk = home, home.with_name("image"), home.with_name("disk")
        image.touch()
        os.truncate(image, 200_000_000)
        self.disk.mkdir()
        mount("mkfs.btrfs", "-q", "-f", image)
        mount("mount", "-o", "loop", image, self.disk)
        mount("btrfs", "quota", "enable", self.disk)
        mount("btrfs", "subvolume", "create", self.disk / "home")
        mount("btrfs", "quota", "rescan", "-w", self.disk)  # waits until the subvolume is counted
        self.grow()
        mount("mount", "--bind", self.disk / "home", home)

    def leave(self, room):
        used = sum(path.stat().st_blocks * 512 for path in self.home.rglob("*"))
        os.sync()
        self._limit(used + room + 16_384)  # the quota counts a node of its tree

    def grow(self):
        self._limit(ROOM)

    def _limit(self, size):
        # 0/256 is the first subvolume. Through its own path a full one cannot be changed.
        mount("btrfs", "qgroup", "limit", str(size), "0/256", self.disk)

    def close(self):
        subprocess.run(["umount", "-l", self.home], capture_output=True)
        subprocess.run(["umount", "-l", self.disk], capture_output=True)


class Tmpfs:
    """A tmpfs of a size, or of a number of inodes."""

    says, option, most = ("a full disk", "B free at"), "size", ROOM

    def __init__(self, home):
        self.home = home
        mount("mount", "-t", "tmpfs", "-o", f"{self.option}={self.most}", "tmpfs", home)

    def used(self):
        status = os.statvfs(self.home)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def leave(self, room):
        self._remount(self.used() + room)

    def grow(self):
        self._remount(self.most)

    def _remount(self, value):
        mount("mount", "-o", f"remount,{self.option}={max(value, 1)}", self.home)

    def close(self):
        subprocess.run(["umount", "-l", self.home], capture_output=True)


class Inodes(Tmpfs):
    says, option, most = ("no inodes left",), "nr_inodes", 2000

    def used(self):
        status = os.statvfs(self.home)
        return status.f_files - status.f_ffree

    def leave(self, room):
        super().leave(room // 16_384)


@pytest.fixture(params=[Quota, Tmpfs, Inodes])
def disk(request, mini):
    for stage in ("words", "count", "slow"):  # the check of free space would refuse all that is tried here
        toy.edit(mini.repo / "stages" / stage / "stage.toml", "disk_gb = 0.001", "disk_gb = 1e-9")
    mini.home.mkdir()
    made = request.param.__new__(request.param)
    made.home, made.disk = mini.home, mini.home.with_name("disk")
    request.addfinalizer(made.close)
    made.__init__(mini.home)
    return made


@pytest.fixture
def ended(mini, command):
    """`ended(*words)` runs a command, which may fail, without a traceback; its exit status and output."""

    def call(*words):
        result = CliRunner().invoke(build.cli, [*words, "--recipe", "toy", "--executor", "local"])
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exc_info)
        assert "Traceback" not in result.output, result.output
        assert result.exit_code == 0 or result.output.strip(), words
        return result.exit_code, result.output

    return call


def names(disk, said):
    return any(words in said for words in disk.says)


@pytest.mark.parametrize("room", [0, 16_384, 65_536, 262_144])
def test_a_disk_that_gives_out_is_named_and_the_next_run_goes_on(mini, ended, disk, room):
    disk.leave(room)
    code, said = ended("run")
    assert code == 0 or names(disk, said), said
    assert code or room, "there was room although there should be none"
    for words in READING:
        ended(*words)
    disk.grow()
    assert mini.run().code == 0
    assert mini.text("slow").startswith("went on from")


@pytest.mark.parametrize("room", [0, 65_536])
def test_what_was_built_is_as_it_was(mini, ended, disk, room):
    assert mini.run().code == 0
    files = [path for path in (mini.home / "store/artifacts").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    disk.leave(room)
    code, said = ended("run", "--force")
    assert code == 0 or names(disk, said), said
    assert ended("verify")[0] == 0
    assert code == 0 or all(path.read_bytes() == content for path, content in before.items())
    disk.grow()
    toy.edit(mini.recipe, "steps: 3", "steps: 4")
    assert mini.run().code == 0


def test_a_stage_that_writes_too_much_is_told_and_leaves_nothing(mini, ended, disk):
    if isinstance(disk, Inodes):
        pytest.skip("a large file takes one inode")
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: large")
    code, said = ended("run")
    assert code == 1 and names(disk, said), said
    assert list((mini.home / "store/tmp").iterdir()) == []
    toy.edit(mini.recipe, "how: large", "how: well")
    assert mini.run().code == 0


def test_a_home_that_was_read_only_from_the_start(mini, ended):
    mini.home.mkdir()
    mount("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", mini.home)
    try:
        for words in READING:
            ended(*words)
        code, said = ended("run")
        assert code == 1 and "a read-only file system" in said and "ANNIE_HOME" in said, said
    finally:
        subprocess.run(["umount", "-l", mini.home], capture_output=True)
    assert mini.run().code == 0
