"""Whatever lies in the home, and whatever the disk says: a sentence with a remedy, never a traceback."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import toy
from click.testing import CliRunner

import build
from forge import journal, lock, trouble
from forge.finding import Refused

READING = [["plan"], ["status"], ["runs"], ["logs", "slow"], ["path", "count"], ["explain", "slow"]]
COMMANDS = [*READING, ["plan", "--json"], ["status", "--json"], ["verify"], ["doctor"]]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting, and being another user, takes root")


@pytest.fixture
def ended(mini, command):
    """`ended(*words)` runs a command, which may fail; its exit status and output."""

    def call(*words):
        result = CliRunner().invoke(build.cli, [*words, "--recipe", "toy", "--executor", "local"])
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exc_info)
        assert result.exit_code in (0, 1) and "Traceback" not in result.output, result.output
        assert result.exit_code == 0 or result.output.strip(), words
        return result.exit_code, result.output

    return call


OTHER = [b"[]", b"3", b"null", b'{"event": 3}\n', b"{}\n", b'{"pid": "x"}', b"\xff\xfe\x00"]


def damaged(content, chance):
    """Bytes that a crash, a bad disk or an editor could have left."""
    kind = chance.randrange(5)
    if kind == 0:
        return content[: chance.randrange(len(content) + 1)]
    if kind == 1:
        return b""
    if kind == 2:
        return bytes(len(content))
    if kind == 3:
        return chance.choice(
            [b"[]", b"3", b"null", b'{"event": 3}\n', b"{}\n", b'{"pid": "x"}', b"\xff\xfe\x00"]
        )
    flipped = bytearray(content or b"x")
    for _ in range(chance.randrange(1, 4)):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def test_no_content_of_the_home_makes_a_traceback(mini, ended):
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: badly")
    mini.run()  # a run that failed: status tells of it
    toy.edit(mini.recipe, "how: badly", "how: well")
    mini.run(last="slow")
    pristine = mini.home.with_name("pristine")
    mini.home.rename(pristine)
    files = sorted(p.relative_to(pristine) for p in pristine.rglob("*") if p.is_file())
    assert len(files) > 20
    chance = random.Random(16)
    for name in files * 2:
        shutil.copytree(pristine, mini.home)
        path = mini.home / name
        path.chmod(0o600)
        path.write_bytes(damaged(path.read_bytes(), chance))
        for words in COMMANDS:
            ended(*words)
        if chance.random() < 0.15:
            ended("run")
        shutil.rmtree(mini.home)


PLACES = ["store/lock", "store/memo.sqlite", "store/tmp", "store/artifacts", "store/artifacts/words", "runs"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/full")])
@pytest.mark.parametrize(
    "name",
    ["store/lock", "store/memo.sqlite", "store/tmp", "store/artifacts", "store/artifacts/words", "runs"],
)
def test_other_things_in_place_of_files_and_folders(mini, ended, name, make):
    path = mini.home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    for words in [*COMMANDS, ["run"]]:
        ended(*words)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pid": 3}', b'{"pid": 1, "since": "x"}', b"\xff"])
def test_a_lock_that_is_signed_with_anything_is_still_a_lock(tmp_path, content):
    path = tmp_path / "lock"
    with lock.held(path, False, print):
        path.write_bytes(content)
        assert lock.describe(lock.holder(path)).endswith("a run that has just started")
        with pytest.raises(Refused, match="just started"), lock.held(path, False, print):
            pass
    assert lock.holder(path) is None


def test_torn_events_are_left_out(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(
        b'{"event": "plan"}\n[]\n{"event": 3}\n\xff\n{"event": "done"}\n{"ev'
    )
    assert [e["event"] for e in journal.events(tmp_path)] == ["plan", "done"]


SAID = {
    errno.ENOSPC: ("a full disk (", "Free some space"),
    errno.EDQUOT: ("the quota of", "Delete some files"),
    errno.EFBIG: ("may not grow any larger", "ulimit -f"),
    errno.EROFS: ("a read-only file system", "ANNIE_HOME"),
    errno.EIO: ("I/O error", "dmesg"),
    errno.ENOTDIR: ("NotADirectoryError", "run again"),
}


@pytest.mark.parametrize("code", SAID)
def test_what_the_system_says_is_a_sentence_with_a_remedy(tmp_path, code):
    for fault in (OSError(code, os.strerror(code), str(tmp_path / "file")), OSError(code, os.strerror(code))):
        finding = trouble.of_fault(tmp_path, fault)
        found, remedy = SAID[code]
        assert found in finding.found and remedy in finding.remedy


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_stage_that_had_no_room_says_which(mini, code):
    words = f"raise OSError({code}, {os.strerror(code)!r})"
    toy.edit(mini.repo / "stages/words/__main__.py", "files = [f", f"{words}\n    files = [f")
    assert mini.run().code == 1
    assert SAID[code][0] in mini.event("failed")["found"]


@pytest.fixture
def small_disk(mini):
    """`small_disk(options)` mounts a tmpfs as the home."""
    mini.home.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mini.home)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this machine mounts no tmpfs")

    yield mount
    subprocess.run(["umount", "-l", str(mini.home)], capture_output=True)


@needs_root
def test_a_home_that_turns_read_only(mini, ended, small_disk):
    small_disk("size=20m")
    assert mini.run().code == 0
    gc.collect()  # what still has the memo open
    subprocess.run(["mount", "-o", "remount,ro", str(mini.home)], check=True)
    for words in [*COMMANDS, ["run"]]:
        assert ended(*words)[0] == 0
    code, said = ended("run", "--force")
    assert code == 1 and "a read-only file system" in said
    toy.edit(mini.recipe, "steps: 3", "steps: 4")
    assert "a read-only file system" in ended("run")[1]
    subprocess.run(["mount", "-o", "remount,rw", str(mini.home)], check=True)
    assert mini.run().ran == ("slow",)


@needs_root
def test_a_disk_without_inodes(mini, ended, small_disk):
    small_disk("size=20m,nr_inodes=25")
    code, said = ended("run")
    assert code == 1 and "no inodes left" in said
    for words in COMMANDS:
        ended(*words)
    subprocess.run(["mount", "-o", "remount,nr_inodes=500", str(mini.home)], check=True)
    assert mini.run().code == 0


@needs_root
def test_a_full_disk_keeps_no_partial_output(mini, small_disk):
    small_disk("size=4m")
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: large")
    assert mini.run().code == 1
    assert list((mini.home / "store/tmp").iterdir()) == []


AS_NOBODY = """
import os, pathlib, sys
from click.testing import CliRunner
import build, forge.report, forge.trouble
build.REPO, words = pathlib.Path(sys.argv[1]), [*sys.argv[2:], "--recipe=toy", "--executor=local"]
CliRunner().invoke(build.cli, words)  # as root, who may load Python's own modules
os.setgid(65534)
os.setuid(65534)
build.cli(words)
"""


@needs_root
@pytest.mark.parametrize("readable", [True, False])
def test_the_store_of_another_user(readable, request):
    place = tempfile.TemporaryDirectory()  # pytest's own folders are closed to others whenever one starts
    request.addfinalizer(place.cleanup)
    mini = toy.Toy(Path(place.name))
    mini.run()
    subprocess.run(["chmod", "-R", "a+rX", place.name], check=True)
    changing = ["run", "--force"]
    for words in [["plan"], ["status"], ["path", "count"], ["logs", "slow"], ["verify"], changing]:
        subprocess.run(["chmod", "-R", "a+rX" if readable else "go-rwx", str(mini.home)], check=True)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(mini.repo), *words],
            env={**os.environ, "ANNIE_HOME": str(mini.home), "PYTHONPATH": str(toy.REPO)},
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        if readable and words != changing:
            assert done.returncode == 0, said
        else:
            assert done.returncode == 1 and "belongs to root" in said and "ANNIE_HOME" in said, said


COMMAND = """
import pathlib, sys, build
build.REPO = pathlib.Path(sys.argv[1])
build.cli([*sys.argv[2:], "--recipe=toy", "--executor=local"])
"""


@needs_root
@pytest.mark.parametrize(
    ("mode", "works"),
    [
        (0o777, True),
        (0o733, True),  # may be entered and written, and not listed: a drop box
        (0o711, False),
        (0o744, False),  # may be listed and not entered
        (0o700, False),
    ],
)
@pytest.mark.parametrize("first", [["run"], ["plan"]], ids=" ".join)
def test_a_home_that_is_new_in_a_folder_of_another_user(mini, tmp_path, mode, works, first):
    """As root without its right to open what is not its own: another user may not run this Python."""
    (shared := tmp_path / "shared").mkdir(mode)
    shared.chmod(mode)
    os.chown(shared, 65534, 65534)
    for words in [first, ["run"], ["doctor"]]:
        ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", COMMAND]
        done = subprocess.run(
            [*ordinary, str(mini.repo), *words],
            env={**os.environ, "ANNIE_HOME": str(shared / "deep/home"), "PYTHONPATH": str(toy.REPO)},
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        if works:
            assert done.returncode == 0, (words, said)
        elif words == ["run"]:
            assert done.returncode == 1 and f"found {shared}, which belongs to nobody" in said, said
            assert "ANNIE_HOME" in said
    assert not works or {oct((shared / name).stat().st_mode) for name in ("deep", "deep/home")} == {"0o40700"}
