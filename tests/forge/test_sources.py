"""What a manifest says of the user's files, and how a change of them is told."""

from __future__ import annotations

import pytest

from forge import sources
from forge.hashing import Memo


@pytest.fixture
def entries(tmp_path):
    """`entries(text)` describes a file of that content in a folder `talks`."""
    memo = Memo(tmp_path / "memo.sqlite")

    def described(content, name="a.jsonl"):
        file = tmp_path / "talks" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return sources.described(memo, [file.parent])

    yield described
    memo.close()


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        (b"a\nb\nc\n", b"a\nx\nc\n", "line 2 changed"),
        (b"a\nb\n", b"a\nb\nc\nd\n", "lines 3-4 added"),
        (b"a\nb\nc\n", b"b\nc\n", "line 1 removed"),
        (b"a\nb\nc\n", b"x\nb\nc\nd", "line 1 changed, line 4 added"),
        (b"a\n", b"", "line 1 removed"),
        (b"", b"a\n", "line 1 added"),
        (b"a\nb", b"a\nb\n", "other content"),  # the end of the last line
        (b"a\r\nb\r\n", b"a\nb\n", "lines 1-2 changed"),
        (b"a\n" * 3, b"a\n\0\n", "other content"),  # no text
        (b"".join(b"%d\nsame%d\n" % (n, n) for n in range(9)),
         b"".join(b"x%d\nsame%d\n" % (n, n) for n in range(9)),
         "lines 1, 3, 5, 7, 9, 11 and 3 more changed"),
    ],
)  # fmt: skip
def test_a_change_is_told_by_line(entries, old, new, phrase):
    assert sources.differences(entries(old), entries(new)) == (f"talks/a.jsonl: {phrase}",)


def test_lines_that_are_the_same_everywhere_take_no_time(entries):
    phrase = sources.differences(entries(b"{}\n" * 20_000), entries(b"{}\n" * 19_999 + b"x\n"))
    assert phrase == ("talks/a.jsonl: line 20000 changed",)


def test_of_a_large_file_only_the_digest_is_kept(entries, monkeypatch):
    monkeypatch.setattr(sources, "MOST_LINES", 2)
    assert set(entries(b"a\nb\nc\n")[0]) == {"name", "sha256"}
    monkeypatch.setattr(sources, "LARGEST", 3)
    assert set(entries(b"a\nb")[0]) == {"name", "sha256", "lines"}
    assert set(entries(b"abcd")[0]) == {"name", "sha256"}
