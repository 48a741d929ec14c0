"""The light check of stage data's files, before a base is downloaded."""

import json

import pytest

from stages.check import PlannedStage
from stages.data import check

TOOLS = [{"type": "function", "function": {"name": "set_timer"}}, {"name": "bare"}]


def given(
    folder,
    prompt=b"You are Annie.",
    tools=json.dumps(TOOLS).encode(),
    rows=b'{"messages": []}\n',
    name="a.jsonl",
):
    (folder / "talks").mkdir()
    paths = {
        "prompt": folder / "prompt.txt",
        "tools": folder / "tools.json",
        "conversations": folder / "talks" / name,
    }
    for path, content in zip(paths.values(), (prompt, tools, rows), strict=False):
        path.write_bytes(content)
    return PlannedStage(
        "data", {}, {**{name: [path] for name, path in paths.items()}, "conversations": [folder / "talks"]}
    )


def test_good_files_have_no_finding(tmp_path):
    assert check.check_sources(given(tmp_path)) == []
    assert (
        check.check_sources(PlannedStage("data", {}, {"prompt": [tmp_path / "prompt.txt"]})) == []
    )  # tools are optional


@pytest.mark.parametrize(
    ("files", "source", "found"),
    [
        ({"prompt": b" \n"}, "prompt", "prompt.txt is empty"),
        ({"prompt": b"Y\0oo\0"}, "prompt", "NUL bytes"),
        ({"tools": b""}, "tools", "tools.json is empty"),
        ({"tools": b"[\n{,"}, "tools", "not JSON"),
        ({"tools": b"3"}, "tools", "holds int"),
        ({"tools": b"[1]"}, "tools", "tool 1"),
        ({"tools": b'[{"name": "x"}, {"function": {}}]'}, "tools", "tool 2"),
        ({"rows": b"PK\x03\x04rest"}, "conversations", "a.jsonl"),
        ({"rows": b"%PDF-1.7 hello"}, "conversations", "a.jsonl"),
        ({"name": "a.txt"}, "conversations", "no file of conversations in talks"),
    ],
)
def test_a_file_that_stage_data_would_refuse_is_named_before(tmp_path, files, source, found):
    (wrong,) = check.check_sources(given(tmp_path, **files))
    assert wrong.subject == f"data.sources.{source}" and found in wrong.found and wrong.level == "error"


def test_a_folder_as_prompt_is_named(tmp_path):
    (wrong,) = check.check_sources(PlannedStage("data", {}, {"prompt": [tmp_path]}))
    assert "is a folder" in wrong.found
