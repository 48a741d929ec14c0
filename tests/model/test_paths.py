"""No name and no link of a stranger's folder leads out of it, and nothing is opened that may have no end."""

import json
import os
import socket

import pytest

from model.weights import paths
from model.weights.paths import CheckpointError, member, members, read_json, shard

NAMES = {
    "absolute": "/etc/passwd",
    "above": "../shard.safetensors",
    "above in the middle": "a/../../shard.safetensors",
    "a backslash": "..\\shard.safetensors",
    "a line end": "a\n.safetensors",
    "a NUL": "a\0.safetensors",
    "an escape sequence": "\x1b[2J.safetensors",
    "text that runs backwards": "a\u202etxt.safetensors",
    "half a surrogate pair": "a\ud800.safetensors",
    "empty": "",
    "the folder itself": ".",
    "an empty part": "a//b.safetensors",
    "longer than a file system allows": "a" * 256 + ".safetensors",
    "longer than a path": "a/" * 600 + "b",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_is_none_of_a_file_in_the_folder_is_refused(tmp_path, name):
    for refuses in (member, shard):
        with pytest.raises(CheckpointError, match="the file name") as error:
            refuses(tmp_path, name)
        assert str(error.value).isprintable() and error.value.expected and error.value.remedy


@pytest.mark.parametrize("name", ["a.json", "..a", "a..b", "a/b/c.json", "über.json", "with space.txt"])
def test_other_names_are_taken(tmp_path, name):
    assert member(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["config.json", "model.bin", "below/model.safetensors"])
def test_a_shard_is_a_safetensors_file_of_the_folder_itself(tmp_path, name):
    with pytest.raises(CheckpointError, match="as a shard"):
        shard(tmp_path, name)


def test_links_are_followed_in_the_folder_and_nowhere_else(tmp_path):
    private = tmp_path / "private"
    private.write_text("{}")
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "below" / "b.json").symlink_to("../a.json")
    assert [path.name for path in members(folder)] == ["a.json", "b.json"]
    for target, found in (
        (private, "a link that leads out"),
        ("../private", "a link that leads out"),
        (tmp_path, "a link that leads out"),
        ("nowhere", "a link to nothing"),
        ("link.json", "a link to nothing"),
        ("below", "a folder"),
    ):
        (folder / "link.json").symlink_to(target)
        for reads in (lambda: member(folder, "link.json"), lambda: list(members(folder))):
            with pytest.raises(CheckpointError, match=f"link.json in folder is {found}"):
                reads()
        with pytest.raises(CheckpointError):
            read_json(folder / "link.json")
        (folder / "link.json").unlink()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="leads out"):
        member(folder, "out/private")


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path):
    cache = tmp_path / "models--acme--tiny"
    snapshot = cache / "snapshots" / "cbd3fa9f"
    (snapshot / "below").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "below" / "config.json").symlink_to("../../../blobs/123")
    assert read_json(snapshot / "config.json") == {"a": 1} and len(list(members(snapshot))) == 2
    named = tmp_path / "link-of-the-user"
    named.symlink_to(snapshot)
    assert read_json(named / "config.json") == {"a": 1}, "the folder itself may be a link: the user named it"
    (snapshot / "other.json").symlink_to("../../other")
    (cache / "other").write_text("{}")
    with pytest.raises(CheckpointError, match="leads out"):
        member(snapshot, "other.json")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket.json"))
    for name, found in (("fifo.json", "a FIFO"), ("socket.json", "a socket")):
        with pytest.raises(CheckpointError, match=f"is {found}"):
            read_json(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a device"):
        member(paths.Path("/dev"), "zero")


@pytest.mark.parametrize(
    "text, found",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[]", "not an object"),
        ("{", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_json_that_readers_would_take_in_two_ways_is_refused(tmp_path, text, found):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=found):
        read_json(tmp_path / "a.json")


def test_json_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "JSON_BYTES", 10)
    (tmp_path / "a.json").write_text(json.dumps({"a": "b" * 10}))
    with pytest.raises(CheckpointError, match="at most|bytes"):
        read_json(tmp_path / "a.json")
