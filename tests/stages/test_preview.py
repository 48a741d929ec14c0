"""A look at rows before there is a base: the tokenizer alone, and what stage data would make of them."""

import dataclasses
import json
import shutil

import contracts
import loopback_hub
import pytest
import small

from stages.base import __main__ as base
from stages.base import make, tokenizer_files
from stages.data import prepare, preview
from stages.job import Job, StageError

PROMPT = "You are Annie."


def talk(question, answer="Yes, Rajesh.", prompt=PROMPT):
    roles = {"system": prompt, "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": said} for role, said in roles.items()]}


def put(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small.tokenizer(small.base(tmp_path_factory.mktemp("published") / "base", "*E"))


def job(stage, folder, params, sources, **inputs):
    for name in ("output", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Job(stage, params, inputs, folder / "output", folder / "scratch", 0, sources)


def names(folder):
    return {path.name for path in folder.iterdir()}


DESCRIBED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
}


def test_of_the_hub_only_what_a_tokenizer_needs_is_downloaded(checkpoint, tmp_path):
    params = contracts.defaults(
        "base", source="hub", repository=loopback_hub.REPOSITORY, commit=loopback_hub.COMMIT
    )
    with loopback_hub.Hub(checkpoint) as hub:
        alone = loopback_hub.Download(tmp_path, params, hub.url, module="stages.base.tokenizer_files")
        code, _, printed = alone.finish()
        assert code == 0 and {request.file for request in hub.requests} - {""} == DESCRIBED, printed
        assert {request.authorization for request in hub.requests} == {f"Bearer {loopback_hub.TOKEN}"}
    assert names(alone.output) == DESCRIBED | {"origin.json"} and loopback_hub.TOKEN not in printed


def test_of_a_folder_weights_stay_out_and_what_no_weight_decides_is_refused(checkpoint, tmp_path):
    task = job("base", tmp_path, contracts.defaults("base", source="folder"), {"folder": [checkpoint]})
    tokenizer_files.run(task)
    assert names(task.output) == DESCRIBED
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    put(broken / "config.json", {"model_type": "bert", "vocab_size": 512})
    with pytest.raises(StageError, match="bert"):
        tokenizer_files.run(dataclasses.replace(task, sources={"folder": [broken]}))


def test_tinys_tokenizer_and_config_are_those_of_the_stage(tmp_path):
    rows = put(tmp_path / "talks.jsonl", *(talk(f"Is it {word}?") for word in ("late", "warm", "far", "big")))
    sizes = {"hidden": 128, "experts": 2, "pattern": "M*E", "short_steps": 1, "steps": 1, "vocabulary": 512}
    params = contracts.defaults("base", source="tiny", short_tokens=500, **sizes)
    whole = job("base", tmp_path / "whole", params, {"conversations": [rows]})
    base.run(whole)
    alone = job("base", tmp_path / "alone", params, {"conversations": [rows]})
    tokenizer_files.run(alone)
    made = {path.name: path.read_bytes() for path in alone.output.iterdir()}
    assert set(made) == DESCRIBED - {"generation_config.json", "model.safetensors.index.json"}
    assert made == {name: (whole.output / name).read_bytes() for name in made}


def test_where_no_conversation_is_usable_tiny_leaves_the_refusal_to_stage_data(tmp_path):
    rows = put(tmp_path / "talks.jsonl", "no JSON", "none either")
    params = contracts.defaults("base", source="tiny", vocabulary=512)
    task = job("base", tmp_path, params, {"conversations": [rows]})
    tokenizer_files.run(task)
    assert preview_of(tmp_path / "data", task.output, rows)["refused"]["found"].startswith(
        "2 of 2 rows are bad"
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make.make_tokenizer([talk(f"Is it {word}?") for word in ("late", "warm", "far")], 512, folder)
    put(folder / "config.json", {"model_type": "nemotron_h", "vocab_size": 512})
    return folder


def data_job(folder, tokenizer, source, rows=(), first=0, **params):
    put(folder / "scratch/given.json", {"rows": list(rows), "first": first})
    put(folder / "prompt.txt", PROMPT)
    sources = {"conversations": [source], "prompt": [folder / "prompt.txt"]}
    given = contracts.defaults("data", **{"eval_share": 0.0, "max_reject_share": 0.5, **params})
    return job("data", folder, given, sources, base=tokenizer)


def preview_of(folder, tokenizer, source, rows=(), first=0, **params):
    task = data_job(folder, tokenizer, source, rows, first, **params)
    preview.run(task)
    return json.loads((task.output / "preview.json").read_text())


def test_counts_are_the_stages_and_rows_are_cut_where_training_begins_and_ends(tokenizer, tmp_path):
    rows = put(
        tmp_path / "talks/a.jsonl", talk("Naïve?", "Yes, naïve 🎉."), talk("Is it far?"), talk("Is it far?")
    )
    seen = preview_of(tmp_path / "seen", tokenizer, rows.parent, first=5)
    prepare.run(data_job(tmp_path / "made", tokenizer, rows.parent))
    told = json.loads((tmp_path / "made/output/stats.json").read_text())
    assert told.pop("histograms") and seen["counts"] == told and told["duplicates"] == 1
    made = [json.loads(line) for line in (tmp_path / "made/output/train.jsonl").read_text().splitlines()]
    assert ["".join(piece["text"] for piece in row["pieces"]) for row in seen["rows"]] == [
        row["text"] for row in made
    ]
    assert [[p["text"] for p in row["pieces"] if p["trained"]] for row in seen["rows"]] == [
        ["Yes, naïve 🎉.<|im_end|>"],
        ["Yes, Rajesh.<|im_end|>"],
    ]
    assert seen["rows"][0]["tokens"] == len(made[0]["input_ids"]) and seen["refused"] is None
    assert names(tmp_path / "seen/output") == {"preview.json"}


def test_a_row_is_found_by_its_place_whatever_becomes_of_it(tokenizer, tmp_path):
    put(tmp_path / "talks/a.jsonl", talk("One?"), talk("Two?", " "), talk("One?"))
    put(tmp_path / "talks/b/a.jsonl", talk("Three?"))
    places = ["talks/a.jsonl:1", "mine/talks/a.jsonl:2", "a.jsonl:3", "b/a.jsonl:1", "c.jsonl:1", "a.jsonl:1"]
    seen = preview_of(tmp_path / "seen", tokenizer, tmp_path / "talks", places)["rows"]
    assert [(row["state"], row["file"], row["line"]) for row in seen] == [
        ("train", "talks/a.jsonl", 1),
        ("rejected", "talks/a.jsonl", 2),
        ("absent", "a.jsonl", 3),
        ("train", "talks/b/a.jsonl", 1),
        ("absent", "c.jsonl", 1),
        ("train", "talks/a.jsonl", 1),
        ("train", "talks/b/a.jsonl", 1),
    ]
    assert not preview.is_named("talks/da.jsonl", "a.jsonl")


def test_rejects_are_grouped_with_the_parameter_that_lets_them_in(tokenizer, tmp_path):
    long = [talk("Why? " * count) for count in (300, 900, 600)]
    rows = put(tmp_path / "a.jsonl", *(talk(f"{n}?") for n in range(4)), *long, "{")
    seen = preview_of(tmp_path / "seen", tokenizer, rows, max_tokens=500)
    assert [(each["count"], each["line"]) for each in seen["reasons"]] == [(3, 5), (1, 8)]
    needed = seen["reasons"][0]["raise"]["max_tokens"]
    again = preview_of(tmp_path / "again", tokenizer, rows, max_tokens=needed)
    assert [each["line"] for each in again["reasons"]] == [8] and again["counts"]["longest"] == needed
    listed = [json.loads(line) for line in (tmp_path / "seen/output/rejects.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in listed) == [5, 6, 7, 8]


def test_what_stage_data_refuses_is_told_in_its_words(tokenizer, tmp_path):
    rows = put(tmp_path / "a.jsonl", talk("One?"), talk("Why? " * 900), "{")
    task = data_job(tmp_path / "stage", tokenizer, rows, max_reject_share=0.1)
    with pytest.raises(StageError) as refused:
        prepare.run(task)
    seen = preview_of(tmp_path / "seen", tokenizer, rows, ["a.jsonl:1", "a.jsonl:3"], max_reject_share=0.1)
    assert (seen["refused"]["found"], seen["counts"]) == (refused.value.found, None)
    assert refused.value.remedy.startswith(seen["refused"]["remedy"])
    assert [row["state"] for row in seen["rows"]] == ["rejected"]
    assert [each["line"] for each in seen["reasons"]] == [3, 2], "the one that is no JSON hides no other"
    foreign = put(tmp_path / "b.jsonl", talk("One?", prompt="You are Bert."))
    assert "1 other system prompts" in preview_of(tmp_path / "b", tokenizer, foreign)["refused"]["found"]
