"""The script of a stage that is left beside its log."""

from pathlib import Path

from forge import render

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_a_run_script_is_its_golden_copy(tmp_path):
    render.write_script(
        tmp_path / "03-train.sh",
        "train",
        "Its output goes where the job says.",
        [
            ["cd", "/home/annie/a clone"],
            ["exec", "env", "-i", "HOME=/tmp/home", "python", "-m", "stages.train", "03-train.json"],
        ],
    )
    assert (tmp_path / "03-train.sh").read_text() == (GOLDEN / "run.sh").read_text()
    assert (tmp_path / "03-train.sh").stat().st_mode & 0o111
