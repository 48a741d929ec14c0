"""Readers of strangers' bytes give a result or their own error within a second, whatever the bytes are.

ANNIE_FUZZ_SECONDS=3600 tries each for an hour; ANNIE_FUZZ_SEED=N begins with the case of a failure.
"""

import subprocess
import sys

import fuzz
import fuzz_readers
import pytest
import torch


@pytest.fixture(params=fuzz_readers.READERS)
def reader(request, tmp_path):
    torch.manual_seed(0)
    with fuzz.ExitStack() as stack:
        yield request.param, fuzz_readers.READERS[request.param](tmp_path, stack)


def test_whole_files_are_taken(reader):
    result = fuzz.Result()
    assert fuzz.Trial(reader[1], result).run("whole", {}), result.failures
    assert result.taken or reader[0] == "excel", "nothing was changed, and it was refused"


def test_changed_files_are_taken_or_refused(reader):
    result = fuzz.fuzz(reader[1], fuzz.SECONDS, fuzz.FIRST_SEED)
    assert not result.failures
    assert result.refused, "no change was refused"


def test_what_once_failed_does_not_fail_again(reader):
    assert not fuzz.replay(reader[1], fuzz.CORPUS / reader[0]).failures


def test_every_case_of_the_corpus_belongs_to_a_reader():
    assert {path.name for path in fuzz.CORPUS.iterdir()} <= {*fuzz_readers.READERS, "README.md"}


def test_a_reader_that_fails_is_told_and_its_files_are_kept(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    reader = fuzz_readers.Reader(lambda: fuzz.json.loads(file.read_bytes()), tmp_path, ["a.json"], ())
    found = fuzz.fuzz(reader, 0.2, 0, tmp_path / "corpus")
    assert "JSONDecodeError" in found.failures[0] and found.failures[0].startswith("ANNIE_FUZZ_SEED=")
    assert 0 < len(list((tmp_path / "corpus").iterdir())) <= fuzz.KEPT
    assert fuzz.replay(reader, tmp_path / "corpus").failures


def test_the_command_prints_an_aligned_table(tmp_path):
    words = [sys.executable, "-m", "tests.stages.fuzz", "--seconds", "0.2", "--ranges", "2"]
    done = subprocess.run(
        [*words, "--corpus", tmp_path, "json", "header"], capture_output=True, text=True, cwd=fuzz.REPO
    )
    head, *rows, _, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "no failure", done.stdout + done.stderr
    assert [row.split()[0] for row in rows] == ["json", "header"] and len({len(head), *map(len, rows)}) == 1
