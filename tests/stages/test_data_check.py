"""The light check of stage data's files, before a base is downloaded."""

import json

import pytest

from stages.check import Given
from stages.data import check

TOOLS = [{"type": "function", "function": {"name": "set_timer"}}, {"name": "bare"}]


def given(folder, prompt=b"You are Annie.", tools=json.dumps(TOOLS).encode(), rows=b"{}\n"):
    (folder / "talks").mkdir()
    paths = {"prompt": folder / "prompt.txt", "tools": folder / "tools.json", "conversations": folder / "talks" / "a.jsonl"}
    for path, content in zip(paths.values(), (prompt, tools, rows)):
        path.write_bytes(content)
    return Given("data", {}, {**{name: [path] for name, path in paths.items()}, "conversations": [folder / "talks"]})


def test_good_files_have_no_finding(tmp_path):
    assert check.look(given(tmp_path)) == []
    assert check.look(Given("data", {}, {"prompt": [tmp_path / "prompt.txt"]})) == []  # tools are optional


@pytest.mark.parametrize(("files", "subject", "found"), [
    ({"prompt": b" \n"}, "prompt.txt", "an empty prompt"), ({"prompt": b"\xff\xfeY\0o\0"}, "prompt.txt", "bytes that are not UTF-8 (at 0)"),
    ({"prompt": b"Y\0o\0"}, "prompt.txt", "NUL bytes"), ({"tools": b""}, "tools.json", "an empty file"), ({"tools": b"[\n{,"}, "tools.json:2", "no JSON"),
    ({"tools": b"{}"}, "tools.json", "a JSON dict"), ({"tools": b"[1]"}, "tools.json", "tool 1 without a name"),
    ({"tools": b'[{"name": "x"}, {"function": {}}]'}, "tools.json", "tool 2 without a name"), ({"rows": b""}, "talks", "a folder without a file that holds something"),
])
def test_a_file_that_is_not_what_it_is_called_is_named(tmp_path, files, subject, found):
    wrong, = check.look(given(tmp_path, **files))
    assert wrong.subject == subject and wrong.found.startswith(found) and wrong.level == "error"


def test_a_folder_as_prompt_is_named(tmp_path):
    wrong, = check.look(Given("data", {}, {"prompt": [tmp_path]}))
    assert wrong.found == "a folder"
