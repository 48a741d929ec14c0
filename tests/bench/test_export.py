"""The benches of merge, quantise and calibration run on a CPU at small widths."""

import json
import sys

from bench import calibrate, export
from model import audit
from model.families.nemotron_h import nano
from stages.base import tiny

CONFIG = tiny.config("ME*", 128, 4, 512) | {"time_step_min": 0.001, "time_step_max": 0.1}


def test_every_row_makes_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nano, "WIDTHS", CONFIG)
    monkeypatch.setattr(export, "TOKENS", CONFIG["vocab_size"])
    base = export.checkpoint(tmp_path / "base", "ME*")
    its = export.adapter(tmp_path / "adapter", base)
    assert audit.bf16(base) == []
    for row, run in export.ROWS.items():
        (tmp_path / row / "made").mkdir(parents=True)
        run(base, its, tmp_path / row / "made")
        if row in ("copy", "merge", "proven"):
            assert audit.bf16(tmp_path / row / "made") == [], row
        elif row != "peft":
            assert audit.nvfp4(tmp_path / row / "made", "nvidia", base, row == "weights") == [], row


def test_the_bench_of_calibration_counts_its_parts(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "calibrate",
            "--device",
            "cpu",
            "--config",
            str(tmp_path / "config.json"),
            "--conversations",
            "2",
            "--tokens",
            "70",
        ],
    )
    calibrate.main()
    assert "3 layers, 2 x 70 tokens" in (printed := capsys.readouterr().out) and "computing" in printed
