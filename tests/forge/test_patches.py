"""images/apply_patches.py on a throw-away site-packages: a series fits exactly, or nothing runs on it."""

import difflib
import importlib.util
from pathlib import Path

import pytest

IMAGES = Path(__file__).resolve().parents[2] / "images"
LIBRARY = "import os\n\n\ndef limit():\n    # seconds\n    return 10\n\ndef name():\n    return 'slow'\n"
TWENTY, FAST = LIBRARY.replace("10", "20"), LIBRARY.replace("10", "20").replace("slow", "fast")


def patch(before, after):
    return "".join(
        difflib.unified_diff(
            before.splitlines(True), after.splitlines(True), "a/library/core.py", "b/library/core.py"
        )
    )


@pytest.fixture
def its(tmp_path, monkeypatch):
    """`its.apply()` runs the script on `its.core`'s site-packages with `its.folder` as the patch folder."""
    spec = importlib.util.spec_from_file_location("apply_patches", IMAGES / "apply_patches.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "site")})

    class Its:
        folder, core = tmp_path / "patches", tmp_path / "site" / "library" / "core.py"

        def apply(self):
            return script.main(self.folder)

    Its.folder.mkdir()
    Its.core.parent.mkdir(parents=True)
    Its.core.write_text(LIBRARY)
    (Its.folder / "limit.patch").write_text(patch(LIBRARY, TWENTY))
    (Its.folder / "name.patch").write_text(patch(TWENTY, FAST))  # its context holds what the first one makes
    (Its.folder / "series").write_text("# why: see README.md\nlimit.patch  # twenty\n\nname.patch\n")
    return Its()


def test_a_series_is_applied_in_its_order(its, capsys):
    assert its.apply() == 0
    assert its.core.read_text() == FAST
    assert capsys.readouterr().out == "applied limit.patch\napplied name.patch\n"


def test_another_order_does_not_fit(its, capsys):
    (its.folder / "series").write_text("name.patch\nlimit.patch\n")
    assert its.apply() == 1
    assert its.core.read_text() == LIBRARY and "applied" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [
        LIBRARY.replace("return 10", "return 15"),  # the line itself
        LIBRARY.replace("# seconds", "# minutes"),
        # GNU patch would take this and the next with its usual fuzz of 2
        LIBRARY.replace("def limit()", "def limit(unit)"),
        LIBRARY.replace("\n\ndef name()", "\n\ndef name(unit)"),
        "import sys\n" + LIBRARY,  # fits as it is, a line further on
    ],
)
def test_a_library_that_changed_under_its_patch_is_refused_with_what_to_do(its, capsys, changed):
    its.core.write_text(changed)
    assert its.apply() == 1
    assert its.core.read_text() == changed
    said = capsys.readouterr().out
    assert (
        "found: limit.patch does not apply" in said and "drop or refresh it" in said and "applied" not in said
    )


def test_a_patch_is_neither_applied_twice_nor_taken_back(its):
    (its.folder / "series").write_text("limit.patch\n")
    assert its.apply() == 0
    assert its.apply() == 1
    assert its.core.read_text() == TWENTY


@pytest.mark.parametrize("missing", ["library", "patch"])
def test_a_missing_file_is_refused(its, missing):
    (its.core if missing == "library" else its.folder / "limit.patch").unlink()
    assert its.apply() == 1


def test_no_series_and_an_empty_one_change_nothing(its):
    (its.folder / "series").write_text("# none\n")
    assert its.apply() == 0
    (its.folder / "series").unlink()
    assert its.apply() == 0 and its.core.read_text() == LIBRARY


@pytest.mark.parametrize("image", ["train", "vllm"])
def test_every_patch_of_an_image_is_in_its_series_and_in_its_readme(image):
    folder = IMAGES / image / "patches"
    listed = [
        line.split("#")[0].strip()
        for series in folder.glob("series*")
        for line in series.read_text().splitlines()
    ]
    readme = (folder / "README.md").read_text()
    assert {name for name in listed if name} == {path.name for path in folder.glob("*.patch")}
    assert all(f"## {path.name}" in readme for path in folder.glob("*.patch"))
