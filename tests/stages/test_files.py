"""What a file is, its bytes say; what is not read is named, and a data set's own held-out rows are never
trained.
"""

import datetime
import gzip
import json
import os
import sqlite3
import time
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from stages.conversations import content, files, rows
from stages.job import StageError

ROW = {
    "messages": [{"role": "user", "content": "Ugadi? ಕ \u2028é"}, {"role": "assistant", "content": "Yes."}]
}
OTHER = {"messages": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]}
TEXT = json.dumps(ROW, ensure_ascii=False) + "\n" + json.dumps(OTHER) + "\n"
PRETTY = json.dumps([ROW, OTHER], indent=2, ensure_ascii=False)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("stages.job.progress", lambda *_: None)


def read(path, raw):
    """The rows and rejects of one file that the recipe names."""
    path.write_bytes(raw)
    return [result for file in files.list_files([path]).files for result in rows.read(file)]


def parquet(path, table):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path.read_bytes()


READ = {
    "JSON Lines": TEXT.encode(),
    "a mark and CRLF": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
    "lone CR": TEXT.replace("\n", "\r").encode(),
    "blank lines, no last newline": b"\n\n" + TEXT.replace("\n", "\n \n").strip().encode(),
    "UTF-16 of PowerShell": TEXT.replace("\n", "\r\n").encode("utf-16"),
    "UTF-16 BE": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-16 without a mark": TEXT.encode("utf-16-le"),
    "UTF-16 BE without a mark": TEXT.encode("utf-16-be"),
    "UTF-16, lone CR": TEXT.replace("\n", "\r").encode("utf-16"),
    "UTF-32": TEXT.encode("utf-32"),
    "UTF-32 without a mark": TEXT.encode("utf-32-le"),
    "an array on one line": json.dumps([ROW, OTHER]).encode(),
    "an array over lines": PRETTY.encode(),
    "an array with a mark and CRLF": b"\xef\xbb\xbf" + PRETTY.replace("\n", "\r\n").encode(),
    "an array in UTF-16": PRETTY.encode("utf-16"),
    "an array with a row a line": ("[\n" + ",\n".join(map(json.dumps, (ROW, OTHER))) + "\n]\n").encode(),
    "objects over lines": (json.dumps(ROW, indent=1) + "\n" + json.dumps(OTHER, indent=1)).encode(),
    "gzip": gzip.compress(TEXT.encode()),
    "gzip in two members": b"".join(gzip.compress(line.encode()) for line in TEXT.splitlines(True) if line),
    "gzip of an array in UTF-16": gzip.compress(PRETTY.encode("utf-16")),
}


@pytest.mark.parametrize("kind", READ)
def test_conversations_are_read_in_each_of_the_forms_that_people_have(tmp_path, kind):
    results = read(tmp_path / "chats", READ[kind])
    assert [row.messages for row in results] == [ROW["messages"], OTHER["messages"]]
    assert [row.line for row in results] == ([1, 2] if "blank" not in kind else [3, 5])


def test_parquet_is_read_and_the_keys_that_arrow_added_are_gone_again(tmp_path):
    """Arrow gives all objects of a column the same keys; a null argument would be trained as the
    word None.
    """
    call = [
        {"function": {"name": name, "arguments": arguments}}
        for name, arguments in (("set_timer", {"minutes": 5}), ("get_weather", {"city": "Pune"}))
    ]
    table = [
        ROW | {"when": datetime.datetime(2026, 1, 1), "category": None},
        {
            "messages": [{"role": "user", "content": "Tea."}, {"role": "assistant", "tool_calls": call}],
            "category": "tea",
        },
    ]
    path = tmp_path / "chats.PARQUET"
    first, second = read(path, parquet(path, table))
    assert first.messages == ROW["messages"] and (first.category, second.category) == ("chats", "tea")
    assert [c["function"]["arguments"] for c in second.messages[1]["tool_calls"]] == [
        {"minutes": 5},
        {"city": "Pune"},
    ]


def test_null_that_the_user_wrote_stays_and_is_refused_in_parquet_too(tmp_path):
    call = {"function": {"name": "set_timer", "arguments": '{"minutes": null}'}}
    path = tmp_path / "chats.parquet"
    [reject] = read(
        path,
        parquet(
            path,
            [
                {
                    "messages": [
                        {"role": "user", "content": "Tea."},
                        {"role": "assistant", "tool_calls": [call]},
                    ]
                }
            ],
        ),
    )
    assert "argument minutes of set_timer is null" in reject.reason


def test_nested_values_of_a_table_may_be_json_in_text(tmp_path):
    tools = [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    ]
    path = tmp_path / "chats.parquet"
    [row] = read(path, parquet(path, [{"messages": json.dumps(ROW["messages"]), "tools": json.dumps(tools)}]))
    assert row.messages == ROW["messages"] and row.tools == tools


def packed(path, *names):
    with zipfile.ZipFile(path, "w") as opened:
        for name in names:
            opened.writestr(name, "x")
    return path.read_bytes()


def database(path):
    with sqlite3.connect(path) as opened:
        opened.execute("create table chats(a)")
    opened.close()
    return path.read_bytes()


FOREIGN = {
    "a zip archive.*Unpack": lambda path: packed(path, "a.jsonl"),
    "an Excel workbook.*JSON Lines": lambda path: packed(path, "xl/workbook.xml"),
    "an old Office file": lambda _: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
    "an SQLite database": database,
    "a table in CSV.*load_dataset": lambda _: b"instruction,input,output\na,b,c\n",
    "a table in CSV": lambda _: b'"user";"assistant"\n1;2\n',
    "a PDF": lambda _: b"%PDF-1.7\n\0\0",
    "HTML or XML.*downloaded": lambda _: b"<!DOCTYPE html>\n<html>",
    "YAML": lambda _: b"messages:\n  - role: user\n",
    "a Git LFS pointer.*git lfs pull": lambda _: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"
    ),
    "a zstd archive.*zstd -d": lambda _: b"\x28\xb5\x2f\xfd\0\0",
    "an Arrow file.*to_parquet": lambda _: b"ARROW1\0\0",
    "Parquet inside gzip": lambda _: gzip.compress(b"PAR1" + b"\0" * 20),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_called_what_it_is_and_never_cut_off(tmp_path, kind):
    path = tmp_path / "chats.jsonl"
    with pytest.raises(StageError, match=f"chats.jsonl is {kind}") as refused:
        read(path, FOREIGN[kind](path))
    assert "cut off" not in str(refused.value)


TORN = {
    "a torn gzip file": gzip.compress(TEXT.encode() * 500)[:-30],
    "a torn gzip file: Compressed": gzip.compress(TEXT.encode())[:14],
    "a torn gzip file: CRC": gzip.compress(TEXT.encode())[:-8] + b"\0" * 8,
    "begins as Parquet and cannot be read": b"PAR1" + b"\0" * 50,
    "the text ends inside row 2: the file was cut off": PRETTY.encode()[:-30],
    "the array has no end after row 2: the file was cut off": PRETTY.rstrip("]").encode(),
    "no comma after row 1 of the array, at line 2": ("[" + TEXT + "]").encode(),
    "more text follows the array, at line 26": (PRETTY + "\n" + PRETTY).encode(),
    r"row 2 is no JSON .Expecting value .*at line 2 of": ("[" + json.dumps(ROW) + ",\n]").encode(),
    "no utf-16-le text": TEXT.encode("utf-16")[:-1],
}


@pytest.mark.parametrize("fault", TORN)
def test_a_torn_file_is_an_error_by_name_and_no_reject_among_others(tmp_path, fault):
    with pytest.raises(StageError, match=f"chats.*{fault}"):
        read(tmp_path / "chats", TORN[fault])


LINES = {
    b'{"messages": [': "not JSON",
    b'{"messages": [{"role": "user", "content": "\xff"}]}': "not UTF-8: byte 0xff",
    b'{"messages": []' + b"\0" * 30: "NUL bytes",
    b'{"messages": ' + b"[" * 100_000: "nested too deeply",
    b'{"messages": ' + b'[{"role": "user", "content": "x", "metadata": ' + b"[" * 950 + b"]" * 950 + b"}]}": (
        ""
    ),
    b'{"messages": [], "score": NaN}': "NaN",
    b'{"messages": [], "messages": []}': "stands twice",
    b'{"messages": [], "n": ' + b"9" * 5000 + b"}": "thousands of digits",
    json.dumps(ROW["messages"]).encode(): "the row is a list",
    b"null": "the row is null",
}


@pytest.mark.parametrize("raw", LINES, ids=[str(raw[:25]) for raw in LINES])
@pytest.mark.parametrize("place", [1, 2])
def test_one_bad_line_is_one_reject_wherever_it_stands(tmp_path, raw, place):
    lines = [line.encode() for line in TEXT.strip().split("\n")]
    lines.insert(place - 1, raw)
    results = read(tmp_path / "chats.jsonl", b"\n".join(lines))
    assert [isinstance(result, rows.Reject) for result in results] == [
        number == place for number in (1, 2, 3)
    ]
    assert (
        results[place - 1].line == place
        and LINES[raw] in results[place - 1].reason
        and len(results[place - 1].head) <= 200
    )


def tree(folder, *names, **more):
    """A folder of files; each holds one row of its own, or what `more` says of its name."""
    for name in [*names, *more]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"messages": [{"role": "user", "content": f"From {name}?"}, *ROW["messages"][1:]]}
        raw = more.get(name, json.dumps(row).encode() + b"\n")
        path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
    return folder


def test_a_folder_is_read_in_all_its_forms_and_letter_cases(tmp_path):
    names = ["a.jsonl", "b.json", "c.ndjson", "d.JSONL", "e.jsonl.gz", "f.Json.GZ", "deep/er/g.jsonl"]
    folder = tree(tmp_path / "talks", *names)
    parquet(folder / "h.Parquet", [OTHER])
    listing = files.list_files([folder])
    assert [file.name for file in listing.files] == sorted(
        f"talks/{name}" for name in [*names, "h.Parquet"]
    ) and not listing.left_out
    assert {file.name: file.stem for file in listing.files}["talks/e.jsonl.gz"] == "e" and len(
        rows.gather(listing).rows
    ) == 8


def test_what_a_folder_has_that_is_not_read_is_named_with_its_reason(tmp_path):
    folder = tree(
        tmp_path / "talks",
        "a.jsonl",
        ".ipynb_checkpoints/a.jsonl",
        ".git/config",
        ".hidden.jsonl",
        "a.jsonl~",
        "#a.jsonl#",
        "a.jsonl.swp",
        "a.jsonl.bak",
        "a (1).jsonl",
        "a - Copy.jsonl",
        "Copy of a.jsonl",
        "b (1).jsonl",
        "renamed.txt",
        "__MACOSX/a.jsonl",
        **{
            "notes.md": b"# Notes\n",
            "todo.txt": b"remember\n",
            "old.csv": b"user,assistant\n1,2\n",
            "empty.jsonl": b"\n",
            "dataset_info.json": b'{"features": {}}',
        },
    )
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    listing = files.list_files([folder])
    gathered = rows.gather(listing)
    assert (
        sorted(row.file for row in gathered.rows) == ["talks/a.jsonl", "talks/b (1).jsonl"]
        and not gathered.rejects
    )
    reasons = {name.removeprefix("talks/"): reason for name, reason in listing.left_out.items()}
    assert reasons == {
        ".ipynb_checkpoints/": "is hidden",
        ".git/": "is hidden",
        ".hidden.jsonl": "is hidden",
        "__MACOSX/": "holds a system's own files",
        **dict.fromkeys(
            ("a.jsonl~", "#a.jsonl#", "a.jsonl.swp", "a.jsonl.bak"), "is an editor's or a download's own copy"
        ),
        **dict.fromkeys(("a (1).jsonl", "a - Copy.jsonl", "Copy of a.jsonl"), "is a copy of a"),
        "todo.txt": "is text",
        "renamed.txt": "holds JSON by its content: end its name in .jsonl or .parquet to have it read",
        "notes.md": "is text (Markdown?)",
        "old.csv": "is a table in CSV",
        "empty.jsonl": "is empty",
        "dataset_info.json": "is one JSON object and no conversation",
        "gone.jsonl": "is a link to nothing",
        "self.jsonl": "is a link to nothing",
        "loop/": "is a link to a folder, which is not followed",
    }


def test_a_file_that_the_recipe_names_is_read_whatever_it_is_called(tmp_path):
    folder = tree(tmp_path / "talks", "test.jsonl", ".hidden.jsonl", "a.bak", "chats.txt")
    listing = files.list_files(
        [folder / name for name in ("test.jsonl", ".hidden.jsonl", "a.bak", "chats.txt")]
    )
    assert [file.split for file in listing.files] == [""] * 4 and not listing.left_out


def test_a_folder_without_conversations_says_what_it_has(tmp_path):
    folder = tree(tmp_path / "talks", **{"notes.md": b"# Notes\n"})
    with pytest.raises(
        StageError, match=r"no file of conversations in talks; there are talks/notes.md \(is text"
    ):
        files.list_files([folder])


def test_a_file_name_that_is_not_utf_8_does_not_stop_the_stage(tmp_path):
    path = os.fsencode(tmp_path) + b"/chats-\xe9.jsonl"
    with open(path, "wb") as opened:
        opened.write(TEXT.encode())
    gathered = rows.gather(files.list_files([tmp_path]))
    assert len(gathered.rows) == 2 and gathered.rows[0].category == "chats-\ufffd"


SPLITS = {
    "train and test": (["train.jsonl", "test.jsonl"], ["test.jsonl"]),
    "validation": (["train.jsonl", "validation.jsonl", "valid.json"], ["valid.json", "validation.jsonl"]),
    "shards of the hub": (
        [
            "data/train-00000-of-00002.jsonl",
            "data/train-00001-of-00002.jsonl",
            "data/test-00000-of-00001.jsonl",
        ],
        ["data/test-00000-of-00001.jsonl"],
    ),
    "named parts": (["train_sft.jsonl", "test_sft.jsonl", "train_gen.jsonl"], ["test_sft.jsonl"]),
    "names before": (["chats-train.jsonl", "chats-eval.jsonl"], ["chats-eval.jsonl"]),
    "folders": (["train/a.jsonl", "Test/a.jsonl", "val/b.jsonl"], ["Test/a.jsonl", "val/b.jsonl"]),
    "beside other names": (["chats.jsonl", "test.jsonl"], ["test.jsonl"]),
    "dev beside train": (["train.jsonl", "dev.jsonl"], ["dev.jsonl"]),
    "dev as a subject": (["ops.jsonl", "dev.jsonl"], []),
    "a test that is a subject": (
        ["eye_test.jsonl", "contest.jsonl", "latest.jsonl", "evaluations.jsonl"],
        [],
    ),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_a_folders_own_split_is_known_by_its_names(tmp_path, kind):
    names, held_out = SPLITS[kind]
    listing = files.list_files([tree(tmp_path / "talks", *names)])
    assert sorted(
        file.name.removeprefix("talks/") for file in listing.files if file.split
    ) == held_out and len(listing.files) == len(names)


def test_sources_that_are_all_held_out_are_refused(tmp_path):
    with pytest.raises(StageError, match=r"nothing but held-out splits: talks/test.jsonl"):
        files.list_files([tree(tmp_path / "talks", "test.jsonl")])


@pytest.mark.trap("held-out-rows-are-trained")
def test_a_copy_of_a_held_out_row_is_never_trained(tmp_path):
    both = json.dumps(ROW).encode() + b"\n"
    folder = tree(
        tmp_path / "talks",
        **{"a_train.jsonl": both + json.dumps(OTHER).encode(), "a_test.jsonl": both + both},
    )
    kept, duplicates, overlap = rows.without_duplicates(rows.gather(files.list_files([folder])).rows)
    assert [(row.file, row.split) for row in kept] == [
        ("talks/a_test.jsonl", "test"),
        ("talks/a_train.jsonl", ""),
    ] and (duplicates, overlap) == (1, 1)


def test_a_rows_own_split_is_obeyed(tmp_path):
    results = read(
        tmp_path / "a.jsonl",
        b"\n".join(json.dumps(ROW | {"split": split}).encode() for split in ("train", "test", "validation")),
    )
    assert [row.split for row in results] == ["", "test", "validation"]


TEXTS = {
    b"\xef\xbb\xbfYou are Annie.\r\nBe brief.\r\n": "utf-8",
    "You are Annie.\rBe brief.\n".encode("utf-16"): "utf-16",
    b"You are Annie.\nBe brief.\n": "plain",
}


@pytest.mark.parametrize("raw", TEXTS, ids=TEXTS.values())
def test_a_text_comes_without_mark_and_with_lf(tmp_path, raw):
    (tmp_path / "prompt.txt").write_bytes(raw)
    assert content.read_text(tmp_path / "prompt.txt", "the prompt") == "You are Annie.\nBe brief.\n"


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b"", "is empty"),
        (b" \r\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9", "no utf-8 text"),
        (b"PK\3\4\0\0\0", "NUL bytes"),
        (None, "is a folder"),
    ],
)
def test_a_text_that_is_none_is_refused_by_name(tmp_path, raw, reason):
    path = tmp_path / "prompt.txt"
    path.mkdir() if raw is None else path.write_bytes(raw)
    with pytest.raises(StageError, match=f"prompt.txt.*{reason}"):
        content.read_text(path, "the production system prompt")


def test_a_hundred_thousand_rows_are_read_in_linear_time(tmp_path):
    def seconds(count):
        raw = b"".join(
            json.dumps(
                {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]}
            ).encode()
            + b"\n"
            for n in range(count)
        )
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(raw)
        began = time.process_time()
        kept, _, _ = rows.without_duplicates(rows.gather(files.list_files([path])).rows)
        assert len(kept) == count
        return time.process_time() - began

    small, large = seconds(2_500), seconds(25_000)
    assert large < 30 * small


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff \n\n", "\u2003\n"])
def test_a_file_that_is_blank_in_its_own_encoding_has_no_rows(tmp_path, text):
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-16-le"))
    assert not rows.gather(files.list_files([tmp_path / "a.jsonl"])).rows
