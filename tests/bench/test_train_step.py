"""The bench of a training step runs every row on a CPU at small widths, and counts the operations that it divides by."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes", reason="needs the train environment")
sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

from bench import operations, train_step  # noqa: E402
from bench.operations import Recipe  # noqa: E402
from stages.base import tiny  # noqa: E402

ROWS = ["ours", "ours-nvfp4-attention", "ours-rounded-experts", "peft-torch", "notebook"]


def test_every_row_takes_a_step_and_the_losses_are_of_one_size(tmp_path, capsys):
    config = tiny.config("ME*", 128, 4, 512) | {"time_step_min": 0.001, "time_step_max": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--rows", ",".join(ROWS), "--config", str(tmp_path / "config.json"), "--device", "cpu", "--length", "96", "--batch", "2", "--steps", "1"]
    assert train_step.main([*arguments, "--json", str(tmp_path / "step.json")]) == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ROWS and not any("why" in row for row in rows)
    assert all(row["ms"] > 0 and 5 < row["loss"] < 8 for row in rows), "random weights: the log of 512 tokens, 6.2"


def test_a_misspelt_row_is_refused_before_any_runs():
    with pytest.raises(SystemExit, match="nootbook: there are notebook, peft, peft-torch, ours"):
        train_step.main(["--rows", "ours,nootbook", "--device", "cpu"])


def test_experts_are_counted_by_hand():
    """16,384 tokens, six experts each, two matrices of 2,688 x 1,856, 23 layers; ours computes the down projection once only."""
    once = 2 * 16384 * 6 * 2 * 2688 * 1856 * 23
    config = operations.sizes(52)
    for down, again in ((True, 1.0), (False, 0.5)):
        recipe = Recipe(down_recomputed=down, targets=frozenset({"attention"}), logits="trained")
        part = next(part for part in operations.count(config, recipe, 16384, 4096, 2048, 8) if part.name == "experts weights")
        assert (part.forward, part.recomputed, part.backward) == (once, again * once, once)
