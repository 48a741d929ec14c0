"""Files that unpack to far more than they are end with a sentence, within bounded memory."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stages.conversations import files, rows
from stages.job import StageError

REPO = Path(__file__).resolve().parents[2]
MB = 1_000_000
ROW = b'{"messages": [{"role": "user", "content": "%s"}]}\n' % (b"Hi " * 20_000)
LINE = "a.jsonl has a line of more than 500 MB"
WHOLE = "a.jsonl is one JSON text of more than 500 MB"
UNPACKS = "a.jsonl has [0-9]+ bytes and unpacks to more than 200 times as many"


def packed(start, piece, count):
    """`start`, and then `piece` so many times, as gzip of several members."""
    return gzip.compress(start) + gzip.compress(piece) * count


def parquet_of(text, count):
    """A Parquet file whose rows all have one text, which it stores once."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = pyarrow.BufferOutputStream()
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [text])
    parquet.write_table(pyarrow.table({"text": column}), buffer, compression="zstd", store_schema=False)
    return buffer.getvalue().to_pybytes()


BOMBS = {
    "a line without end": (lambda: packed(b'{"messages": "', b" " * MB, 5000), LINE),
    "an array without end": (lambda: packed(b"[\n1,\n", b" " * MB, 5000), WHOLE),
    "a small line without end": (lambda: packed(b'{"messages": "', b" " * MB, 60), UNPACKS),
    "many rows": (lambda: packed(ROW, ROW * 100, 50), UNPACKS),
    "a line of 600 MB": (lambda: b'{"messages": "' + bytes(600 * MB), LINE),
    "an array of 600 MB": (lambda: b"[\n1,\n" + bytes(600 * MB), WHOLE),
    "one large value in many rows": (
        lambda: parquet_of(" " * 100 * MB, 2000),
        "256 rows of a.jsonl take more than 4 GB of memory",
    ),
    "many rows in few bytes": (lambda: parquet_of("x" * 1000, 100_000), UNPACKS),
}
READS = """
import resource, sys
from pathlib import Path
from stages.conversations import files, rows
from stages.job import StageError
try:
    rows.gather(files.list_files([Path(sys.argv[1])]))
except StageError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_ends_with_a_sentence_within_bounded_memory(tmp_path, kind):
    make, found = BOMBS[kind]
    (tmp_path / "a.jsonl").write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", READS, tmp_path / "a.jsonl"],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=120,
    )
    *_, said, kilobytes = done.stdout.splitlines()
    assert re.match(found, said), done.stdout + done.stderr
    assert int(kilobytes) * 1024 < (5000 if "value" in kind else 2500) * MB, kilobytes


def test_a_file_of_nothing_but_rejects_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_REJECTS", 10)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 11)
    with pytest.raises(StageError, match="more than 10 rows that cannot be used, the last at line 11"):
        rows.gather(files.list_files([tmp_path / "a.jsonl"]))


def test_rows_that_repeat_a_long_prompt_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(ROW * 100))
    assert rows.gather(files.list_files([tmp_path / "a.jsonl"])).total == 100
