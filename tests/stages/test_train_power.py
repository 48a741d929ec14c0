"""A power cut at any operation on files leaves a training run a whole checkpoint, and its teacher."""

import shutil

import power
import pytest
import short
from safetensors import safe_open

from stages.train import checkpoints, fit, teacher
from stages.train.ranks import Ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def loop(made, tmp_path):
    return short.loop(tmp_path / "scratch", made, targets="attention", rank=1)[0]


def left(disk, tmp_path):
    """Each cut, laid out as the scratch folder that `disk` recorded."""
    assert len(disk.cuts) > 2
    for cut in disk.cuts.values():
        folder = cut.laid_out(tmp_path / "cut")
        yield cut, folder
        shutil.rmtree(folder)


def test_the_newest_checkpoint_is_the_last_that_was_saved_or_the_one_before(loop, tmp_path):
    scratch = loop.task.scratch
    with power.recorded(scratch) as disk:
        for step in range(1, 5):
            loop.save(step)
            disk.mark()
    for cut, folder in left(disk, tmp_path):
        newest, damaged = checkpoints.newest(folder)
        step = checkpoints.step_number(newest) if newest else 0
        assert step in (cut.marks, cut.marks + 1) and not damaged, cut.moment


def test_a_damaged_checkpoint_is_saved_anew(loop, tmp_path):
    scratch = loop.task.scratch
    for step in (1, 2):
        loop.save(step)
    (scratch / "checkpoint-2/history.json").write_text("")
    with power.recorded(scratch) as disk:
        loop.save(2)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        newest, _ = checkpoints.newest(folder)
        assert newest and checkpoints.step_number(newest) in ((2,) if cut.marks else (1, 2)), cut.moment


def test_what_the_teacher_said_is_whole_or_not_there(loop, made, tmp_path):
    rows = fit.read_rows(made["data"] / "train.jsonl")
    with power.recorded(loop.task.scratch) as disk:
        teacher.Teacher(loop.task, Ranks()).record(loop.model, rows, begins=True)
        disk.mark()
    for cut, folder in left(disk, tmp_path):
        files = list(folder.glob("teacher-*.safetensors"))
        assert files or not cut.marks, cut.moment
        for file in files:
            with safe_open(file, "pt") as opened:
                assert len(opened.keys()) == 2 * len(rows), cut.moment
