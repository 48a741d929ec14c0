"""What serving leaves beside artifacts is the old file or the new one, wherever the power is cut."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from product import render, serving_record
from product.serving_record import Record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "forge"))
import power

OLD, NEW = Record("old", 8000, "annie-1"), Record("new", 8000, "annie-2")


def record(folder, value):
    serving_record.write(folder, value)


def override(folder, value):
    described = {"service": render.SERVICE, "device": "cpu", "memory_gb": 8}
    render.write_override(folder, value.folder, value.server, "recipe toy", described)


@pytest.mark.parametrize("write, name", [(record, serving_record.FILE), (override, render.OVERRIDE)])
def test_a_file_of_serving_is_the_old_one_or_the_new(tmp_path, write, name):
    disk_folder, cut_folder = tmp_path / "disk", tmp_path / "cut"
    disk_folder.mkdir()
    write(disk_folder, OLD)
    old = (disk_folder / name).read_text()
    with power.recorded(disk_folder) as disk:
        write(disk_folder, NEW)
        disk.mark()
    new = (disk_folder / name).read_text()
    for cut in disk.cuts.values():
        text = (cut.laid_out(cut_folder) / name).read_text()
        assert text in ((new,) if cut.marks else (old, new)), cut.moment
        shutil.rmtree(cut_folder)
