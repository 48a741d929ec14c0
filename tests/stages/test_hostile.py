"""Folders and adapters of strangers: what would lead out of them, or never end, is refused by
name before a stage writes anything.
"""

import json
import os
import shutil

import adapters
import contracts
import pytest
import small
from safetensors.torch import load_file

from model import checkpoint_audit
from model.weights.checkpoint import INDEX, Checkpoint
from stages.base import __main__ as base
from stages.conversations import content, files
from stages.job import Job, StageError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    checkpoint = small.base(folder / "base", "*E")
    small.tokenizer(checkpoint)
    return {
        "base": checkpoint,
        "data": small.data(folder / "data"),
        "train": small.adapter(folder / "train", checkpoint, "attention"),
    }


@pytest.fixture
def stranger(made, tmp_path):
    """A copy of the base, to be changed."""
    return shutil.copytree(made["base"], tmp_path / "stranger" / "base")


def moved(folder, name):
    """The folder with its first shard under another name in the index, and the file there."""
    file = Checkpoint(folder).files[0]
    target = folder / name
    shutil.move(folder / file, target)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {t: name if f == file else f for t, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return target


def listed(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def take(folder, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    params = contracts.defaults("base", source="folder")
    base.run(Job("base", params, {}, output, tmp_path, 0, {"folder": [folder]}))
    return output


@pytest.mark.parametrize("where", ["absolute", "../shard.safetensors"])
def test_a_merge_never_overwrites_the_users_own_shard(made, stranger, tmp_path, where):
    name = str(tmp_path / "shard.safetensors") if where == "absolute" else where
    target = moved(stranger, name)
    before = target.read_bytes(), listed(tmp_path)
    task = adapters.task(tmp_path, {**made, "base": stranger}, made["train"])
    with pytest.raises(StageError, match="the file name"):
        adapters.merge.run(task)
    with pytest.raises(StageError, match="the file name"):
        take(stranger, tmp_path)
    assert target.read_bytes() == before[0] and not list(task.output.iterdir())
    assert not list((tmp_path / "output").iterdir())


LINKS = {
    "a link to a private file": lambda path, private: path.symlink_to(private),
    "a link above": lambda path, private: path.symlink_to(f"../../{private.name}"),
    "a link to a folder": lambda path, private: path.symlink_to(private.parent),
    "a link to nothing": lambda path, private: path.symlink_to("nowhere"),
    "a FIFO": lambda path, _: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", ["extra.txt", "config.json", "tokenizer.json", INDEX, "below/extra.txt"])
def test_no_link_and_no_fifo_is_taken_into_an_artifact(made, stranger, tmp_path, kind, name):
    private = tmp_path / "private"
    private.write_text("a secret")
    path = stranger / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    LINKS[kind](path, private)
    with pytest.raises(StageError, match=rf"{path.name} in base is a (link|FIFO)"):
        take(stranger, tmp_path)
    assert not list((tmp_path / "output").iterdir())
    if "/" not in name:
        task = adapters.task(tmp_path, {**made, "base": stranger}, made["train"])
        with pytest.raises(StageError, match=f"{path.name}"):
            adapters.merge.run(task)
        assert not list(task.output.iterdir())


def test_a_snapshot_of_the_hubs_cache_becomes_files(made, tmp_path):
    cache = tmp_path / "models--acme--tiny"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "cbd3fa9f"
    shutil.copytree(made["base"], blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    output = take(snapshot, tmp_path)
    assert {path.name for path in output.iterdir()} == {path.name for path in blobs.iterdir()}
    assert not any(path.is_symlink() for path in output.iterdir())


def test_an_audit_of_a_strangers_folder_reads_nothing_outside(made, stranger, tmp_path):
    moved(stranger, "../shard.safetensors")
    (finding,) = checkpoint_audit.audit(stranger).findings
    assert "leads out of its folder" in finding.found and finding.remedy
    for name in ("config.json", "hf_quant_config.json"):
        other = shutil.copytree(made["base"], tmp_path / name)
        (other / name).unlink(missing_ok=True)
        os.mkfifo(other / name)
        assert any(f"{name} in {name} is a FIFO" in f.found for f in checkpoint_audit.audit(other).findings)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "part"])
def test_an_adapter_reads_nothing_outside_its_folder(made, tmp_path, name):
    train = shutil.copytree(made["train"], tmp_path / "train")
    file = train / "adapter" / ("adapter_model.safetensors" if name == "part" else name)
    shutil.move(file, tmp_path / "private.safetensors")
    if name == "part":
        table = dict.fromkeys(load_file(tmp_path / "private.safetensors"), "../../private.safetensors")
        file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": table}))
    else:
        file.symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(StageError, match="leads out of"):
        adapters.merged(tmp_path, made, train)


def test_conversations_of_a_folder_are_not_read_from_outside(tmp_path):
    (tmp_path / "private.jsonl").write_text('{"messages": []}\n')
    folder = tmp_path / "talks"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"messages": []}\n')
    (folder / "b.jsonl").symlink_to("a.jsonl")
    (folder / "c.jsonl").symlink_to("../private.jsonl")
    os.mkfifo(folder / "d.jsonl")
    listing = files.list_files([folder])
    assert [file.name for file in listing.files] == ["talks/a.jsonl", "talks/b.jsonl"]
    assert listing.left_out == {
        "talks/c.jsonl": "is a link out of the folder, which is not followed",
        "talks/d.jsonl": "is no file",
    }
    chosen = files.list_files([folder / "c.jsonl"])
    assert [file.path for file in chosen.files] == [folder / "c.jsonl"], "the user named this link"


def test_a_source_that_may_have_no_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "talks.jsonl")
    with pytest.raises(StageError, match="is a FIFO"):
        files.list_files([tmp_path / "talks.jsonl"])
    with pytest.raises(StageError, match="is a FIFO"):
        content.read_text(tmp_path / "talks.jsonl", "the prompt")
    with pytest.raises(StageError, match="is a FIFO, a socket or a device"):
        content.read_text(files.Path("/dev/zero"), "the prompt")
