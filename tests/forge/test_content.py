"""Artifacts are what their manifests say: what notices that they are not, and what happens then."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import toy

from forge import hashing, manifest
from forge.finding import Refused
from forge.store import Store


@pytest.fixture
def built(mini):
    assert mini.run().code == 0
    return mini


def folder(mini, stage):
    return next((mini.home / "store/artifacts" / stage).iterdir())


def text(mini, stage="words"):
    return folder(mini, stage) / "text.txt"


def flip(path, bit=3):
    """One bit of the first byte, with size and mtime as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1 << bit
    path.chmod(0o600)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def stage(mini, name):
    return next(s for s in mini.plan().stages if s.name == name)


def replace_by_copy(path):
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def replace_by_link(path):
    path.rename(path.parents[4] / "elsewhere")
    path.symlink_to(path.parents[4] / "elsewhere")


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


NAMES_AND_SIZES = {
    "cut": (lambda path: os.truncate(path, 3), "text.txt has 3 bytes of 16"),
    "longer": (lambda path: os.truncate(path, 17), "text.txt has 17 bytes of 16"),
    "deleted": (lambda path: path.unlink(), "text.txt is missing"),
    "a further file": (lambda path: (path.parent / "b").touch(), "b is there, and no file of it"),
    "a further file below": (
        lambda path: ((path.parent / "d").mkdir(), (path.parent / "d/b").touch()),
        "d/b is there, and no file of it",
    ),
    "a link": (replace_by_link, "text.txt is no plain file"),
    "a FIFO": (replace_by_fifo, "text.txt is no plain file"),
    "a folder": (replace_by_folder, "text.txt is missing"),
}


@pytest.mark.parametrize("how", NAMES_AND_SIZES)
def test_a_plan_names_what_names_and_sizes_show_and_a_run_makes_it_again(built, how):
    damage, words = NAMES_AND_SIZES[how]
    damage(text(built))
    assert stage(built, "words").why == f"its artifact is damaged: {words}"
    assert built.run().ran == ("words",)
    assert built.text("words") == "alpha beta gamma"
    assert set(built.states().values()) == {"cached"}


SAME_CONTENT = {
    "mode": lambda path: path.chmod(0o644),
    "times": lambda path: os.utime(path, (1, 1)),
    "inode": replace_by_copy,
    "links": lambda path: os.link(path, path.parents[4] / "second"),
    "another disk": lambda path: (
        shutil.copytree(path.parent, path.parents[4] / "copy"),
        shutil.rmtree(path.parent),
        shutil.move(path.parents[4] / "copy", path.parent),
    ),
}


@pytest.mark.parametrize("how", SAME_CONTENT)
def test_equal_content_is_read_again_before_use_and_accepted(built, how):
    SAME_CONTENT[how](text(built))
    words = stage(built, "words")
    assert (words.state, words.unread) == ("cached", ("text.txt",))
    assert words.why.endswith("text.txt may have changed, and will be read before use")
    shutil.rmtree(folder(built, "count"))
    assert built.run().ran == ("count",)
    read = built.event("read")
    assert (read["stage"], read["damages"], read["bytes"]) == ("words", [], 16)
    assert stage(built, "words").unread == ()


def test_a_plan_after_a_run_has_read_everything(built):
    assert [s.unread for s in built.plan().stages] == [(), (), ()]


def test_other_content_is_found_before_a_stage_uses_it_and_made_again(built):
    flip(text(built))
    assert stage(built, "words").state == "cached"  # no plan reads large files
    shutil.rmtree(folder(built, "count"))
    assert built.run().ran == ("words", "count")
    assert built.event("read")["damages"] == ["text.txt has other content than when it was made"]
    why = next(e["why"] for e in built.events if e["event"] == "stage" and e["stage"] == "words")
    assert why == "its artifact is damaged: text.txt has other content than when it was made"
    assert (built.text("words"), built.text("count")) == ("alpha beta gamma", "3")
    assert set(built.states().values()) == {"cached"}


def test_a_damaged_input_that_is_not_selected_stops_the_run(built):
    flip(text(built))
    assert built.run(only=("count",), force=True).code == 1
    failed = built.event("failed")
    assert failed["subject"] == "words" and "text.txt has other content" in failed["found"]
    assert "--until words" in failed["remedy"]
    assert stage(built, "words").why.startswith("its artifact is damaged: text.txt has other content")


def product(mini):
    toy.edit(
        mini.repo / "stages/slow/stage.toml",
        "[needs]",
        '[parameters.serves]\ntype = "str"\ndefault = "a"\nchoices = ["a"]\ndoc = "what"\n'
        '[build]\nimage = "plain"\ntag = "annie/toy"\nby = "serves"\n'
        '[build.contexts]\na = {count = "count"}\n[needs]',
    )


def rot(mini, path):
    """Other bytes under the same times: the memo takes the file for the one that it knows."""
    known = hashing.of_text(path.read_text())
    flip(path)
    time.sleep(0.12)
    mini.context().store.memo.remember(path.stat(), known)


def test_decayed_bits_are_found_before_an_image_is_built(built):
    """A forged report, or bits that rotted: nothing but reading shows it."""
    rot(built, text(built, "count"))
    assert (stage(built, "count").state, stage(built, "count").unread) == ("cached", ())
    product(built)
    assert built.run().ran == ("count", "slow")
    assert [(e["stage"], e["damages"]) for e in built.events if e["event"] == "read"] == [
        ("count", ["text.txt has other content than when it was made"]),
        ("count", []),
    ]


def test_a_disk_that_changes_what_was_just_made_stops_the_run(built, monkeypatch):
    rot(built, text(built, "count"))
    product(built)
    rot_when_accepted(built, monkeypatch, "count", times=2)
    assert built.run().code == 1
    assert "check this machine's disk and memory" in built.event("failed")["remedy"]


def rot_when_accepted(mini, monkeypatch, name, times):
    """The next `times` artifacts of a stage decay as soon as they are accepted."""
    real, left = Store.accept, [None] * times

    def accept(self, stage, *rest):
        artifact = real(self, stage, *rest)
        if stage == name and left:
            left.pop()
            rot(mini, artifact.folder / "text.txt")
        return artifact

    monkeypatch.setattr(Store, "accept", accept)


def test_a_forced_run_forces_each_stage_once_also_where_an_input_is_made_again(built, monkeypatch):
    product(built)
    rot_when_accepted(built, monkeypatch, "count", times=1)
    assert built.run(force=True).ran == ("words", "count", "slow")
    assert [e["stage"] for e in built.events if e["event"] == "stage"] == ["words", "count", "count", "slow"]


def test_verify_reads_every_byte(built, command):
    said = command("verify")
    assert said.count("whole") == 3 and "words" in said
    rot(built, text(built))
    said = command("verify", code=1)
    assert "words: found text.txt has other content" in said and "--until words" in said
    assert stage(built, "words").why.startswith("its artifact is damaged: text.txt")  # the plan knows it now
    assert built.run().ran == ("words",)
    command("verify")


def test_verify_names_all_that_is_wrong_and_reads_on_behind_it(built, command):
    (folder(built, "words") / "further").touch()
    flip(text(built, "words"))
    rot(built, text(built, "slow"))
    said = command("verify", "--json", code=1)  # with what went to stderr
    stages = json.loads(said[said.index("{") : said.rindex("}") + 1])["stages"]
    assert [(s["stage"], s["state"]) for s in stages] == [
        ("words", "damaged"),
        ("count", "whole"),
        ("slow", "damaged"),
    ]
    assert stages[0]["damages"] == [
        "text.txt has other content than when it was made",
        "further is there, and no file of it",
    ]
    assert "Did you mean count?" in command("verify", "cuont", code=1)
    assert "whole" in command("verify", "count")


def test_verify_of_what_is_not_built(mini, command):
    assert command("verify").count("not built") == 3


def test_a_digest_that_changed_in_the_memo_is_not_believed(tmp_path):
    path, place = tmp_path / "file", tmp_path / "memo.sqlite"
    path.write_text("content")
    os.utime(path, (1, 1))
    time.sleep(0.12)
    memo = hashing.Memo(place)
    sha256 = memo.file(path)
    memo.close()
    content = place.read_bytes()
    assert content.count(sha256.encode()) == 1
    place.write_bytes(content.replace(sha256.encode(), b"0" * 64))
    assert hashing.Memo(place).known(path.stat()) is None


@pytest.mark.parametrize("bits", range(0, 8192 * 8, 1201))
def test_a_flipped_bit_of_the_memo_never_makes_a_file_count_as_changed(mini, bits, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("content")
    os.utime(path, (1, 1))
    time.sleep(0.12)
    memo = hashing.Memo(tmp_path / "memo.sqlite")
    memo.file(path)
    memo.close()
    content = bytearray((tmp_path / "memo.sqlite").read_bytes())
    content[bits // 8 % len(content)] ^= 1 << bits % 8
    (tmp_path / "memo.sqlite").write_bytes(content)
    again = hashing.Memo(tmp_path / "memo.sqlite")
    assert again.known(path.stat()) in (None, hashing.of_text("content"))
    assert again.file(path) == hashing.of_text("content")


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"", b"SQLite format 3\x00" + b"\xff" * 9000])
def test_a_damaged_memo_is_made_anew_with_a_note(built, content, capsys):
    (built.home / "store/memo.sqlite").write_bytes(content)
    assert set(built.states().values()) == {"cached"}
    assert ("was damaged and is made anew" in capsys.readouterr().err) == bool(content)
    assert built.run(first="count", force=True).code == 0
    assert stage(built, "count").unread == ()


def test_a_memo_that_cannot_be_used_is_told_of_once(built, capsys):
    (built.home / "store/memo.sqlite").unlink()
    (built.home / "store/memo.sqlite").mkdir()
    assert set(built.states().values()) == {"cached"}
    said = capsys.readouterr().err
    assert said.count("memo.sqlite cannot be used (") == 1 and "made anew" not in said


def edited(path, change):
    value = json.loads(path.read_text())
    changed = change(value)
    path.chmod(0o600)
    path.write_text(json.dumps(value if changed is None else changed))


def with_name(name):
    return lambda m: m["files"].update({name: m["files"].pop("text.txt")})


def setting(field, value):
    return lambda m: m.update({field: value})


def consistent(change):
    """An edit that also puts the digest right."""

    def whole(m):
        change(m)
        m["digest"] = hashing.of_entries((n, e["sha256"]) for n, e in m["files"].items())

    return whole


EDITS = {
    "digest": (setting("digest", "0" * 64), "digest"),
    "a file less": (lambda m: m["files"].clear(), "digest"),
    "another sha256": (lambda m: m["files"]["text.txt"].update(sha256="0" * 64), "digest"),
    "key": (setting("key", "0" * 64), "key"),
    "a component": (lambda m: m["components"].update(seed="4"), "key"),
    "stage": (setting("stage", "count"), "which is not its folder"),
    "absolute": (consistent(with_name("/etc/passwd")), "the file name"),
    "above": (consistent(with_name("../../x")), "the file name"),
    "a dot": (consistent(with_name("./text.txt")), "the file name"),
    "empty name": (consistent(with_name("")), "the file name"),
    "control character": (consistent(with_name("a\nb")), "the file name"),
    "surrogate": (consistent(with_name("a\udc80b")), "the file name"),
    "NUL": (consistent(with_name("a\0b")), "the file name"),
    "its own name": (consistent(with_name("manifest.json")), "the file name"),
    "negative size": (lambda m: m["files"]["text.txt"].update(size=-1), "size = -1"),
    "true size": (lambda m: m["files"]["text.txt"].update(size=True), "size = true"),
    "text size": (lambda m: m["files"]["text.txt"].update(size="3"), "size = "),
    "short sha256": (lambda m: m["files"]["text.txt"].update(sha256="abc"), "sha256 = "),
    "entry": (lambda m: m["files"].update({"text.txt": 3}), "size = null"),
    "files": (setting("files", []), "files that are no map"),
    "components": (setting("components", {"seed": 3}), "components"),
    "seconds": (setting("seconds", float("nan")), "seconds = NaN"),
    "long": (setting("seconds", 10**400), "seconds = 1000"),
    "created": (setting("created", "2026-01-01T00:00:00"), "no time with its zone"),
    "no time": (setting("created", "yesterday"), "no time with its zone"),
    "recipe": (setting("recipe", None), "recipe = null"),
    "executor": (lambda m: m.update(executor=None), "executor = null"),
    "list": (lambda m: [], "no object"),
    "null": (lambda m: 3, "no object"),
}


@pytest.fixture
def accepted(tmp_path):
    """A store that holds one artifact."""
    store = Store(tmp_path / "home")
    facts = {"components": {"seed": "3"}, "seconds": 1.0, "recipe": "toy", "executor": "local"}
    key = hashing.of_value(facts["components"])
    output, _ = store.begin("words", key)
    (output / "text.txt").write_text("alpha")
    store.accept("words", key, output, "text", ["text.txt"], facts)
    return store


@pytest.mark.parametrize("how", EDITS)
def test_an_edited_manifest_is_refused_by_name_with_a_remedy(accepted, how):
    change, words = EDITS[how]
    (path,) = accepted.root.glob("artifacts/words/*/manifest.json")
    edited(path, change)
    for ask in (lambda: accepted.find("words", path.parent.name), lambda: accepted.newest("words", "toy")):
        with pytest.raises(Refused) as refused:
            ask()
        (finding,) = refused.value.findings
        assert finding.subject == str(path) and words in finding.found
        assert f"delete the folder {path.parent}" in finding.remedy


@pytest.mark.parametrize("sources", [[], {"files": {}}, {"files": [[]]}, {"files": [{"name": "a"}]}])
def test_what_a_manifest_says_of_sources_is_checked_too(built, sources):
    path = folder(built, "words") / "manifest.json"
    edited(path, lambda m: m.update(sources=sources))
    with pytest.raises(Refused, match="sources"):
        Store(built.home).newest("words", "toy")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_torn_manifest_is_refused(accepted, content):
    (path,) = accepted.root.glob("artifacts/words/*/manifest.json")
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(Refused, match="damaged or was edited"):
        accepted.newest("words", "toy")


def test_every_command_refuses_an_edited_manifest_and_the_remedy_helps(built, command):
    path = folder(built, "words") / "manifest.json"
    edited(path, lambda m: m.update(digest="0" * 64))
    for words in (["plan"], ["run"], ["status"], ["verify"], ["path", "words"], ["explain", "words"]):
        said = command(*words, code=1).replace("\n", "")
        assert str(path) in said and "delete the folder" in said
    shutil.rmtree(path.parent)
    assert built.run().ran == ("words",)


def test_a_manifest_that_is_no_file_is_not_opened(built):
    path = folder(built, "words") / "manifest.json"
    replace_by_fifo(path)
    with pytest.raises(Refused, match="no plain file"):
        built.plan()
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(Refused, match="no plain file"):
        built.plan()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", os.fsdecode(b"a\xffb")])
def test_an_output_with_a_name_that_cannot_be_shown_is_not_taken(mini, name):
    toy.edit(
        mini.repo / "stages/words/__main__.py",
        "(task.output",
        f"(task.output / {name!r}).touch()\n    (task.output",
    )
    assert mini.run().code == 1
    assert "the file name" in mini.event("failed")["found"]
    assert not manifest.plain_name(name)
