"""What forge writes is for its user alone, whatever the umask; for a group too where the machine says so."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import toy

from forge import lock, modes
from forge.store import Store


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def entries(home):
    return {p: stat.S_IMODE(p.lstat().st_mode) for p in [home, *home.rglob("*")]}


def run(mini):
    """A run of every stage; a stage leaves scratch and a folder, as a container's umask would."""
    toy.edit(
        mini.repo / "stages/words/__main__.py",
        "(task.output",
        '(task.output / "deep").mkdir(); (task.output / "deep/a").touch()\n    '
        'for p in (task.output / "deep", task.output / "deep/a"): p.chmod(0o777)\n    (task.output',
    )
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    how: badly")
    assert mini.run().code == 1


def test_nothing_in_the_home_can_be_read_by_others(mini, umask, monkeypatch):
    monkeypatch.delenv("ANNIE_SHARED", raising=False)
    run(mini)
    written = entries(mini.home)
    assert {p: oct(mode) for p, mode in written.items() if mode & 0o077} == {}
    names = {p.name for p in written}
    assert {"events.jsonl", "plan.json", "03-slow.sh", "03-slow.log", "memo.sqlite", "lock", "done"} <= names
    scripts = [mode for p, mode in written.items() if p.suffix == ".sh"]
    assert set(scripts) == {0o700}
    assert {written[p] for p in written if "artifacts" in p.parts and p.is_file()} == {0o400}
    assert modes.findings(mini.home) == []


def test_a_group_may_read_and_not_write_where_the_machine_is_shared(mini, umask, monkeypatch):
    monkeypatch.setenv("ANNIE_SHARED", "1")
    run(mini)
    written = entries(mini.home)
    assert {p: oct(mode) for p, mode in written.items() if mode & 0o027} == {}
    forges = [p for p in written if "scratch" not in p.parts and "tmp" not in p.parts]
    assert {p: oct(written[p]) for p in forges if not written[p] & 0o040} == {}
    assert {written[p] for p in written if p.suffix == ".log"} == {0o640}
    assert modes.findings(mini.home) == []


def test_the_lock_and_memo_of_a_new_store(tmp_path, umask, monkeypatch):
    monkeypatch.delenv("ANNIE_SHARED", raising=False)
    with lock.held(tmp_path / "home/store/lock", False, print):
        assert Store(tmp_path / "home").memo.known(tmp_path.stat()) is None
    assert {oct(mode) for p, mode in entries(tmp_path / "home").items()} == {"0o700", "0o600"}


MAKE = """
import os, pathlib, sys
from forge import modes
calls, real = [], os.sync
os.sync = lambda: calls.append(real())
modes.make_folder(pathlib.Path(sys.argv[1]) / "a/b")
modes.write(pathlib.Path(sys.argv[1]) / "file", "x")
print(len(calls))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user takes root")
@pytest.mark.parametrize(("mode", "syncs"), [(0o777, 0), (0o733, 2)])
def test_a_folder_that_may_not_be_listed_is_synced_with_all_of_the_disk(tmp_path, mode, syncs):
    """As root without its right to open what is not its own. Only an open folder can be synced by itself."""
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(mode)
    os.chown(shared, 65534, 65534)
    ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", MAKE]
    variables = {**os.environ, "PYTHONPATH": str(toy.REPO)}
    done = subprocess.run([*ordinary, str(shared)], env=variables, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{syncs}\n", "")
    assert stat.S_IMODE((shared / "a").stat().st_mode) == 0o700 and (shared / "file").read_text() == "x"


def test_a_file_that_may_not_be_read_is_no_folder_to_sync(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", str(tmp_path / "file"))

    (tmp_path / "file").touch()
    monkeypatch.setattr(modes.os, "open", refuse)
    with pytest.raises(PermissionError):
        modes.sync(tmp_path / "file")


def test_doctor_says_what_others_can_read(mini, command, monkeypatch):
    monkeypatch.delenv("ANNIE_SHARED", raising=False)
    assert "has what it takes" in command("doctor")
    mini.home.chmod(0o755)
    (mini.home / "envs").mkdir()
    (mini.home / "envs/numpy.py").touch()
    (mini.home / "notes").write_text("private")
    (mini.home / "notes").chmod(0o640)
    said = command("doctor")
    assert "1 file in" in said and "that others can read: notes" in said
    assert f"chmod -R go-rwx {mini.home}" in said
    monkeypatch.setenv("ANNIE_SHARED", "1")
    assert "has what it takes" in command("doctor")
    monkeypatch.setenv("ANNIE_SHARED", "yes")
    assert "ANNIE_SHARED: found 'yes'" in command("doctor")


def test_a_file_behind_a_closed_folder_is_not_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed/file").write_text("private")
    (tmp_path / "closed/file").chmod(0o644)
    tmp_path.chmod(0o755)
    assert modes.findings(tmp_path) == []


def test_git_takes_the_sample_and_nothing_of_a_user():
    def git(*words: str):
        return subprocess.run(["git", *words], cwd=toy.REPO, capture_output=True, text=True).stdout.split()

    theirs = ["data/mine.jsonl", "data/kitchen/talks.txt", "talks.jsonl", "talks.parquet", "api.key"]
    sample = ["data/sample/conversations/new.jsonl", "data/sample/notes.txt"]
    assert git("check-ignore", "--no-index", *theirs, *sample) == theirs
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []
