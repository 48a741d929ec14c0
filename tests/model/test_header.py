"""A header is taken if it describes the bytes of its file exactly once, and refused by name otherwise."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from model.weights import checkpoint, header
from model.weights.checkpoint import INDEX, Checkpoint
from model.weights.paths import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}


def written(file, table, data=bytes(16), length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def changed(name="a", **fields):
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_the_good_one_is_taken(tmp_path):
    entries, metadata = header.header(written(tmp_path / "a.safetensors", GOOD))
    assert list(entries) == ["a", "b"] and metadata == {}


TABLES = {
    "no JSON": (b"{a", "broken header"),
    "no UTF-8": (b'{"\xff": 1}', "broken header"),
    "an array": ([1], "not an object"),
    "nested without end": (b"[" * 100_000, "nested too deeply"),
    "a name twice": (
        json.dumps(GOOD).replace('"b"', '"a"').encode(),
        "the key 'a' stands twice",
    ),
    "metadata of numbers": ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__"),
    "metadata as a list": ({**GOOD, "__metadata__": ["a"]}, "__metadata__"),
    "metadata of null": ({**GOOD, "__metadata__": None}, "__metadata__"),
    "a name without a letter": ({**GOOD, "": GOOD["a"]}, "a tensor has no name"),
    "an entry of null": ({**GOOD, "a": None}, "a has not dtype"),
    "an entry without dtype": ({**GOOD, "a": {"shape": [2], "data_offsets": [0, 8]}}, "a has not dtype"),
    "an entry with more keys": (changed(more=1), "a has not dtype"),
    "an unknown dtype": (changed(dtype="F31"), "a has the dtype 'F31'"),
    "a dtype that is a list": (changed(dtype=["F32"]), "a has the dtype"),
    "a negative size": (changed(shape=[-2]), "a has the shape"),
    "two negative sizes": (changed(shape=[-2, -1]), "a has the shape"),
    "a size as text": (changed(shape=["2"]), "a has the shape"),
    "a size with a fraction": (changed(shape=[2.0]), "a has the shape"),
    "NaN for a size": (changed(shape=[float("nan")]), "a has the shape"),
    "true for a size": (changed(shape=[True, 2]), "a has the shape"),
    "a size without end": (changed(shape=[2**62, 2**62]), "a has the shape"),
    "dimensions without end": (changed(shape=[1] * 5000), "a has the shape"),
    "a shape that is a number": (changed(shape=2), "a has the shape"),
    "a shape of other bytes": (changed(shape=[3]), r"a takes 12 bytes as F32 \(3,\), and has 8"),
    "negative offsets": (changed(data_offsets=[-8, 0]), "a has the data_offsets"),
    "offsets backwards": (changed(data_offsets=[8, 0]), "a has the data_offsets"),
    "one offset": (changed(data_offsets=[8]), "a has the data_offsets"),
    "three offsets": (changed(data_offsets=[0, 8, 16]), "a has the data_offsets"),
    "offsets as text": (changed(data_offsets=["0", "8"]), "a has the data_offsets"),
    "offsets with fractions": (changed(data_offsets=[0.0, 8.0]), "a has the data_offsets"),
    "infinite offsets": (changed(data_offsets=[0, float("inf")]), "a has the data_offsets"),
    "offsets as an object": (changed(data_offsets={"0": 8}), "a has the data_offsets"),
    "offsets past the end": (changed("b", data_offsets=[800, 808]), "truncated: b ends at byte"),
    "the same bytes twice": (changed("b", data_offsets=[0, 8]), "a and b share bytes"),
    "bytes in part twice": (changed("b", data_offsets=[4, 12]), "a and b share bytes"),
    "a hole at the start": (changed(data_offsets=[4, 12]), "the header and a have 4 bytes"),
    "a hole in the middle": (
        {"a": GOOD["a"], "c": {**GOOD["b"], "data_offsets": [9, 17]}},
        "truncated|have 1",
    ),
    "a hole at the end": ({"a": GOOD["a"]}, "8 bytes after its last tensor, a"),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_header_that_is_not_the_formats_is_refused_by_name(tmp_path, fault):
    table, found = TABLES[fault]
    with pytest.raises(CheckpointError, match=found) as error:
        header.header(written(tmp_path / "a.safetensors", table))
    assert "a.safetensors" in error.value.found and error.value.expected and error.value.remedy
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "length, found",
    [
        (0, "not a safetensors file"),
        (1, "not a safetensors file"),
        (2**63, "not a safetensors file"),
        (2**64 - 1, "not a safetensors file"),
        (10, "broken header"),
    ],
)
def test_a_length_that_is_not_the_headers_is_refused(tmp_path, length, found):
    with pytest.raises(CheckpointError, match=found):
        header.header(written(tmp_path / "a.safetensors", GOOD, length=length))


def test_a_header_of_gigabytes_is_refused_unread(tmp_path):
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 2**33))
        opened.truncate(2**34)
    with pytest.raises(CheckpointError, match="announces a header of 8589934592 bytes"):
        header.header(file)


def shards(folder, first, second, table):
    for file, names in (("one.safetensors", first), ("two.safetensors", second)):
        save_file({name: torch.ones(2) for name in names}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))


ONE, TWO = "one.safetensors", "two.safetensors"
INDEXES = {
    "a name in two shards": ("ab", "bc", {"a": ONE, "b": TWO, "c": TWO}, f"b is in {ONE}"),
    "a name that its shard lacks": (
        "ab",
        "c",
        {"a": ONE, "b": ONE, "c": TWO, "d": TWO},
        f"d is not in {TWO}",
    ),
    "a name in another shard": ("ab", "c", {"a": ONE, "b": TWO, "c": TWO}, f"b is in {ONE}"),
    "a name that the index lacks": ("ab", "c", {"a": ONE, "c": TWO}, f"b is in {ONE}"),
    "a shard that is not there": ("ab", "c", {"a": ONE, "b": ONE, "c": "three.safetensors"}, "three"),
    "a shard outside": ("ab", "c", {"a": ONE, "b": ONE, "c": "../two.safetensors"}, "leads out"),
    "an absolute shard": ("ab", "c", {"a": ONE, "b": ONE, "c": "/two.safetensors"}, "absolute"),
    "a shard as a number": ("ab", "c", {"a": ONE, "b": ONE, "c": 2}, "no weight_map"),
    "a list": ("ab", "c", ["a"], "no weight_map"),
}


@pytest.mark.parametrize("fault", INDEXES)
def test_an_index_that_disagrees_with_its_shards_is_refused_by_name(tmp_path, fault):
    *files, found = INDEXES[fault]
    shards(tmp_path, *files)
    with pytest.raises(CheckpointError, match=found) as error:
        Checkpoint(tmp_path)
    assert error.value.expected and error.value.remedy


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_named_and_never_loaded(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"it has {name}, a pickle") as error:
        checkpoint.Checkpoint(tmp_path)
    assert "safetensors" in error.value.remedy
