"""`[build]` of a contract: what the serving image is made from, by a parameter."""

from pathlib import Path

import pytest

from forge import artifact_types, contract
from forge.finding import Refused

REPO = Path(__file__).resolve().parents[2]
TYPES = artifact_types.load(REPO / "stages")


@pytest.mark.parametrize(
    ("serves", "wanted"),
    [
        ("nvfp4", {"checkpoint": Path("/quantize"), "adapter": None}),
        ("merged", {"checkpoint": Path("/merge"), "adapter": None}),
        ("tuned", {"checkpoint": Path("/base"), "adapter": Path("/train/adapter")}),
    ],
)
def test_every_way_to_serve_has_its_contexts(serves, wanted):
    assert (
        contract.load(REPO / "stages/package", TYPES).product.folders(
            {"serves": serves}, lambda name: Path("/") / name
        )
        == wanted
    )


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('checkpoint = "merge"', 'checkpoint = "marge"', "build.contexts names marge"),
        ("merged = {", "mergd = {", "build.contexts for nvfp4, mergd, tuned"),
        ('by = "serves"', 'by = "max_model_len"', "build.contexts for"),
        ('by = "serves"\n', "", r"\[build\] with image, contexts"),
    ],
)
def test_a_build_that_fits_no_parameter_or_input_is_refused(before, after, found, tmp_path):
    text = (REPO / "stages/package/stage.toml").read_text()
    assert before in text
    (tmp_path / "stage.toml").write_text(text.replace(before, after))
    with pytest.raises(Refused, match=found):
        contract.load(tmp_path, TYPES)
