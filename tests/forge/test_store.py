"""Artifacts: taken whole or not at all, and left alone afterwards."""

from __future__ import annotations

import os
import time

import pytest

from forge import hashing
from forge.finding import Refused
from forge.store import Store

FACTS = {"components": {"seed": "1"}, "seconds": 1.0, "recipe": "toy", "executor": "local"}
KEY = hashing.of_value(FACTS["components"])
FILES = ("text.txt",)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def written(store, text):
    output, scratch = store.begin("words", KEY)
    (output / "text.txt").write_text(text)
    (scratch / "checkpoint").write_text("half way")
    return output


def test_an_artifact_is_sealed_and_its_scratch_removed(store):
    artifact = store.accept("words", KEY, written(store, "one"), "text", FILES, FACTS)
    assert (artifact.folder / "text.txt").stat().st_mode & 0o222 == 0
    assert not store.unfinished("words", KEY) and not list(store.tmp.iterdir())
    assert store.find("words", KEY) == artifact and artifact.bytes == 3
    assert {"key", "components", "files", "digest", "type", "seconds", "recipe", "executor"} <= set(
        artifact.manifest
    )


def test_a_new_artifact_of_the_same_key_takes_the_place_of_the_old(store):
    old = store.accept("words", KEY, written(store, "one"), "text", FILES, FACTS)
    new = store.accept("words", KEY, written(store, "two"), "text", FILES, FACTS)
    assert (
        old.folder == new.folder
        and (new.folder / "text.txt").read_text() == "two"
        and not list(store.tmp.iterdir())
    )


def test_a_refused_output_leaves_the_old_artifact_and_the_scratch(store):
    old = store.accept("words", KEY, written(store, "one"), "text", FILES, FACTS)
    output = written(store, "two")
    (output / "text.txt").unlink()
    (output / "link").symlink_to("/etc/passwd")
    with pytest.raises(Refused) as refused:
        store.accept("words", KEY, output, "text", FILES, FACTS)
    assert [f.found for f in refused.value.findings] == ["no text.txt", "link, which is no plain file"]
    assert (old.folder / "text.txt").read_text() == "one" and store.unfinished("words", KEY)


def test_a_file_that_the_user_still_has_stays_writable(store, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    output, _ = store.begin("words", KEY)
    os.link(mine, output / "text.txt")
    store.accept("words", KEY, output, "text", FILES, FACTS)
    assert mine.stat().st_mode & 0o200


def test_leftovers_of_a_killed_run_go(store):
    written(store, "half")
    store.clean()
    assert not list(store.tmp.iterdir()) and store.unfinished("words", KEY)


def test_the_digest_is_that_of_names_and_content(store):
    one = store.accept("words", KEY, written(store, "same"), "text", FILES, FACTS)
    two = store.accept("count", KEY, written(store, "same"), "text", FILES, {**FACTS, "seconds": 9.0})
    assert one.digest == two.digest == hashing.of_entries([("text.txt", hashing.of_text("same"))])


def test_a_file_is_read_again_only_when_it_has_changed(store, tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_text("one")
    os.utime(path, (1, 1))
    time.sleep(0.15)  # a file that was touched a moment ago is not remembered yet
    first = store.memo.file(path)
    reads = []
    real = hashing.of_content
    monkeypatch.setattr(hashing, "of_content", lambda *a: reads.append(1) or real(*a))
    assert store.memo.file(path) == first and Store(store.home).memo.file(path) == first and not reads
    path.write_text("two")  # the same size and, a moment later, the same mtime
    os.utime(path, (1, 1))
    assert store.memo.file(path) == hashing.of_text("two") and reads == [1]
