"""The base, made, taken or downloaded: what comes out is a whole BF16 checkpoint, and anything else is
refused by name.
"""

import io
import json
import shutil
import tracemalloc
from pathlib import Path

import contracts
import loopback_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import audit
from model.families import serve
from model.weights import origin
from model.weights.checkpoint import INDEX, Checkpoint, files_beside
from model.weights.origin import Origin
from model.weights.paths import TRUST
from stages import job
from stages.base import __main__ as base
from stages.base import tokenizer as words
from stages.job import Job, StageError

REPO = Path(__file__).resolve().parents[2]
HUB = contracts.defaults("base", source="hub", repository=loopback_hub.REPOSITORY, commit=loopback_hub.COMMIT)
ORIGIN = {
    "origin.json": json.dumps({"repository": loopback_hub.REPOSITORY, "commit": loopback_hub.COMMIT}).encode()
    + b"\n"
}
QUICK = {"vocabulary": 512, "short_tokens": 60, "short_steps": 1, "steps": 1, "batch_tokens": 256}


def run(folder, sources=None, **params):
    output = folder / "output"
    output.mkdir(parents=True)
    base.run(Job("base", contracts.defaults("base", **params), {}, output, folder, 7, sources or {}))
    return output


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """Every twentieth of the sample's lessons: all kinds, few enough for seconds."""
    file = tmp_path_factory.mktemp("lessons") / "lessons.jsonl"
    file.write_text("".join((REPO / "data/sample/lessons.jsonl").read_text().splitlines(keepends=True)[::20]))
    return file


@pytest.fixture(scope="module")
def made(lessons, tmp_path_factory):
    return run(tmp_path_factory.mktemp("made"), {"lessons": [lessons]}, **QUICK)


def test_tiny_makes_a_whole_checkpoint_with_the_published_keys(made):
    assert audit.bf16(made) == []
    published = json.loads((REPO / "tests/model/golden/nano-config.json").read_text())
    config = json.loads((made / "config.json").read_text())
    assert published.keys() - config.keys() == {"auto_map"} and config.keys() <= published.keys()
    assert {name: type(config[name]) for name in config} == {name: type(published[name]) for name in config}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (made / name).stat().st_size > 0
    assert len(Checkpoint(made).files) > 1, "several shards, so that what streams shards is exercised"


@pytest.mark.trap("pad-is-the-end-token")
def test_tiny_has_the_special_tokens_at_their_ids_and_no_pad(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    assert {number: tokenizer.convert_ids_to_tokens(number) for number in words.SPECIAL} == words.SPECIAL
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token) == (11, 1, None)
    assert (
        tokenizer.decode(tokenizer("<think></think>")["input_ids"], skip_special_tokens=True)
        == "<think></think>"
    )
    assert json.loads((made / "config.json").read_text())["vocab_size"] >= len(tokenizer)


@pytest.mark.trap("router-in-bf16")
def test_tiny_s_correction_bias_is_one_that_bf16_would_flatten(made):
    checkpoint = Checkpoint(made)
    for name in (n for n in checkpoint.entries if n.endswith("e_score_correction_bias")):
        bias = checkpoint.tensor(name)
        assert bias.dtype == torch.float32 and len(bias.bfloat16().unique()) == 1 < len(bias.unique())


def test_tiny_is_the_same_to_the_byte_when_made_again(made, lessons, tmp_path):
    again = run(tmp_path, {"lessons": [lessons]}, **QUICK)
    assert contents(again) == contents(made)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"hidden": 192}, "hidden 192; expected a multiple of 128"),
        ({"pattern": "MX*E"}, r"pattern 'MX\*E' with \['X'\]"),
        ({"pattern": "MEME"}, "at least one attention layer"),
        ({"short_tokens": 5}, "no lesson has 5 tokens or fewer"),
    ],
)
def test_tiny_refuses_sizes_that_cannot_work(lessons, tmp_path, change, reason):
    with pytest.raises(StageError, match=reason):
        run(tmp_path, {"lessons": [lessons]}, **{**QUICK, **change})


def test_tiny_names_the_line_of_a_bad_lesson(lessons, tmp_path):
    (tmp_path / "bad.jsonl").write_text(lessons.read_text().splitlines()[0] + "\n{}\n")
    with pytest.raises(StageError, match="bad.jsonl:2 is not a conversation"):
        run(tmp_path, {"lessons": [tmp_path / "bad.jsonl"]}, **QUICK)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def take(folder, tmp_path):
    return run(tmp_path / "taken", {"folder": [folder]}, source="folder")


def test_a_folder_with_another_origin_json_is_refused_and_a_base_keeps_its_own(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "origin.json").write_text('{"origin": "elsewhere"}')
    with pytest.raises(StageError, match="origin.json with repository ''"):
        take(folder, tmp_path / "refused")
    named = Origin(loopback_hub.REPOSITORY, loopback_hub.COMMIT)
    origin.write(folder, named)
    assert origin.read(take(folder, tmp_path)) == named


def test_folder_takes_a_checkpoint_as_it_is_and_reads_it_a_tensor_at_a_time(made, tmp_path, monkeypatch):
    events = io.StringIO()
    monkeypatch.setattr(job, "_events", events)
    before, checkpoint = contents(made), Checkpoint(made)
    tracemalloc.start()
    try:
        output = take(made, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert contents(output) == before == contents(made)
    assert peak < checkpoint.bytes / 4
    read = [e for e in map(json.loads, events.getvalue().splitlines()) if e.get("unit") == "GB"]
    assert (
        len(read) == len(checkpoint.entries)
        and read[-1]["done"] == read[-1]["total"] == checkpoint.bytes / 1e9
    )


EXPERT = "backbone.layers.1.mixer.experts.2.up_proj.weight"
A_LOG = "backbone.layers.0.mixer.A_log"
BREAKS = {
    "missing": (EXPERT, lambda t: t.pop(EXPERT), "no such tensor"),
    "extra": ("lora_left_over", lambda t: t.update({"lora_left_over": torch.ones(1)}), "no place for"),
    "wrong shape": (EXPERT, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), r"BF16 \(128, 64\)"),
    "NaN": (EXPERT, lambda t: t[EXPERT][3, 4].fill_(float("nan")), "NaN or infinity"),
    "infinite": (EXPERT, lambda t: t[EXPERT][3, 4].fill_(float("inf")), "NaN or infinity"),
    "recast": (A_LOG, lambda t: t.update({A_LOG: t[A_LOG].bfloat16()}), r"BF16 \(4,\)"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_folder_refuses_a_bad_tensor_by_name(made, tmp_path, fault):
    name, change, found = BREAKS[fault]
    broken = shutil.copytree(made, tmp_path / "broken")
    entries = Checkpoint(broken).entries
    file = entries[name if name in entries else EXPERT].file
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((broken / INDEX).read_text())
    others = {other: shard for other, shard in index["weight_map"].items() if shard != file.name}
    index["weight_map"] = others | dict.fromkeys(tensors, file.name)
    (broken / INDEX).write_text(json.dumps(index))
    with pytest.raises(StageError, match=f"{name}: .*{found}"):
        take(broken, tmp_path)


def edited(folder, **values):
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), **values})
    )


def cut(folder):
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])


WHOLES = {
    "quantised in its config": (
        lambda f: edited(f, quantization_config={"quant_method": "fp8"}),
        "already quantised",
    ),
    "quantised by modelopt": (lambda f: (f / audit.QUANT).write_text("{}"), "already quantised"),
    "another model": (lambda f: edited(f, model_type="llama"), "model_type 'llama'"),
    "native config": (lambda f: edited(f, hybrid_override_pattern=None), "no hybrid_override_pattern"),
    "config cut off": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "file cut off": (cut, r"model-\d+-of-\d+.safetensors is truncated"),
    "shard missing": (
        lambda f: sorted(f.glob("*.safetensors"))[0].unlink(),
        "model-00001-of-.*not in the folder",
    ),
    "trust in itself": (lambda f: (f / TRUST).write_text("{}"), "has a trust.json"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat_template.jinja"),
}


@pytest.mark.parametrize("fault", WHOLES)
def test_folder_refuses_what_is_no_bf16_checkpoint(made, tmp_path, fault):
    change, found = WHOLES[fault]
    broken = shutil.copytree(made, tmp_path / "broken")
    change(broken)
    with pytest.raises(StageError, match=found):
        take(broken, tmp_path)
    assert not list((tmp_path / "taken" / "output").iterdir())


@pytest.mark.parametrize("trust", [True, False])
def test_what_the_recipe_trusts_stands_in_the_base_and_goes_no_further(made, tmp_path, trust):
    taken = run(tmp_path, {"folder": [made]}, source="folder", trust=trust)
    assert serve.trusted(taken) is trust and not serve.trusted(made)
    assert TRUST not in [path.name for path in files_beside(taken)]


@pytest.fixture(scope="module")
def published(made, tmp_path_factory):
    """The tiny checkpoint with an embedding larger than the 10 MiB that huggingface_hub writes at a time."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("published") / "checkpoint")
    return loopback_hub.enlarge(folder, 48 * 1024)


@pytest.fixture
def hub(published):
    with loopback_hub.Hub(published) as running:
        yield running


def test_hub_resumes_an_interrupted_download_and_never_shows_the_token(hub, published, tmp_path):
    hub.breaks = "stall"
    first = loopback_hub.Download(tmp_path, HUB, hub.url)
    assert hub.stalled.wait(60)
    first.process.kill()
    assert loopback_hub.TOKEN not in first.finish()[2] and not list(first.output.iterdir())

    hub.breaks = "drop"
    second = loopback_hub.Download(tmp_path, HUB, hub.url)
    code, _, printed = second.finish()
    assert code == 0, printed
    assert contents(second.output) == contents(published) | ORIGIN
    assert sum(r.file == "config.json" for r in hub.requests) == 1, "a whole file is not asked for again"
    large = [r.range for r in hub.requests if r.file == loopback_hub.LARGE]
    assert large == [None, None, f"bytes={loopback_hub.BLOCK}-"], "killed, dropped, taken up where it broke"
    assert not list(second.scratch.rglob("*.incomplete"))
    assert {r.authorization for r in hub.requests} == {
        f"Bearer {loopback_hub.TOKEN}"
    } and loopback_hub.TOKEN not in printed


def test_hub_downloads_nothing_that_the_earlier_artifact_has(hub, published, tmp_path):
    previous = shutil.copytree(published, tmp_path / "previous")
    (previous / "config.json").write_text((published / "config.json").read_text().replace(" ", "\t"))
    (previous / "generation_config.json").unlink()
    download = loopback_hub.Download(tmp_path, HUB, hub.url, previous=str(previous))
    code, _, printed = download.finish()
    assert code == 0, printed
    assert contents(download.output) == contents(published) | ORIGIN
    assert {r.file for r in hub.requests if r.file} == {"config.json", "generation_config.json"}


def test_hub_refuses_a_file_with_another_digest(hub, tmp_path):
    hub.altered = "config.json"
    its = loopback_hub.Download(tmp_path, HUB, hub.url)
    code, last, printed = its.finish()
    assert (code, last["event"]) == (1, "error") and "config.json has digest" in last["found"], printed
    assert not list(its.output.iterdir()) and not (its.scratch / "config.json").exists()


def test_hub_tells_a_refused_connection_from_a_fault_of_its_own(tmp_path):
    code, last, printed = loopback_hub.Download(tmp_path, HUB, "http://127.0.0.1:9").finish()
    assert (
        code == 1
        and "ConnectError while downloading" in last["found"]
        and "Run again" in last["remedy"]
        and loopback_hub.TOKEN not in printed
    )


@pytest.mark.parametrize("commit", ["main", "v1.0", "abc123", "A" * 40, "0" * 39])
def test_hub_wants_a_commit_and_no_name_that_can_move(tmp_path, commit):
    with pytest.raises(StageError, match="40 hex digits"):
        run(tmp_path, source="hub", repository="acme/tiny", commit=commit)
