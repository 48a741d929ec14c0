"""Shards written one tensor at a time are what the safetensors library reads, and damage is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.weights import checkpoint
from model.weights.checkpoint import Checkpoint, Slot, shards, write, write_index
from model.weights.paths import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.tensor(0.5),
    "c": torch.ones(2, 16).to(torch.float8_e4m3fn),
}
SLOTS = [Slot("a", "BF16", (2, 3)), Slot("b", "F32", ()), Slot("c", "F8_E4M3", (2, 16))]


def test_what_is_written_is_what_the_library_reads(tmp_path):
    write(tmp_path / "model.safetensors", SLOTS, lambda slot: TENSORS[slot.name])
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys() and found["b"].shape == ()
    assert all(
        found[n].dtype == t.dtype and torch.equal(found[n].float(), t.float()) for n, t in TENSORS.items()
    )


def test_what_the_library_writes_is_read_one_tensor_at_a_time(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    assert all(torch.equal(found.tensor(n).float(), t.float()) for n, t in TENSORS.items())


def test_shards_keep_to_their_limit_and_are_found_through_the_index(tmp_path):
    layout = shards(SLOTS, 16)
    assert [name for name, _ in layout] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name, group in layout:
        write(tmp_path / name, group, lambda slot: TENSORS[slot.name])
    write_index(tmp_path, layout)
    assert list(Checkpoint(tmp_path).entries) == ["a", "b", "c"]


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a came out as"):
        write(tmp_path / "x.safetensors", SLOTS[:1], lambda slot: torch.zeros(3, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("kept", [4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Checkpoint(tmp_path)


def test_a_config_is_parsed_once(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    read, parsed = checkpoint.read_json, []
    monkeypatch.setattr(checkpoint, "read_json", lambda file: parsed.append(file.name) or read(file))
    found = Checkpoint(tmp_path)
    assert [found.config["hidden_size"], found.config["hidden_size"]] == [8, 8]
    assert parsed == ["config.json"]


def test_what_tells_of_one_folder_alone_does_not_go_along(tmp_path):
    along = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    for name in [*along, "manifest.json", "merge.json", "model-00001-of-00001.safetensors"]:
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert [path.name for path in checkpoint.files_beside(tmp_path)] == along
