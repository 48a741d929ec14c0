"""The three ways to serve what the small recipe made, each from a recipe, each asked what the adapter
answers otherwise than the base.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request

import pytest
import yaml
from conftest import BUILD, HOME, REPO, free_port, ran

from forge import last_run


@pytest.fixture(autouse=True)
def noted():
    """The home's last run stays what it was: these recipes are gone afterwards."""
    before = (HOME / last_run.FILE).read_text()
    yield
    (HOME / last_run.FILE).write_text(before)


@pytest.mark.trap("adapter-not-applied")
@pytest.mark.parametrize("serves", ["nvfp4", "merged", "tuned"])
def test_what_is_served_answers_as_the_tuned_model(serves, tmp_path):
    recipe = yaml.safe_load((REPO / "recipes/tiny.yaml").read_text().replace("../data", f"{REPO}/data"))
    recipe["stages"]["package"] = {"serves": serves}
    (tmp_path / "its.yaml").write_text(yaml.safe_dump(recipe))
    its = ("--recipe", str(tmp_path / "its.yaml"), "--executor", "local")
    ran(*BUILD, "run", *its)  # the demo has made all but the image
    port = free_port()
    try:
        assert f"it answers as the {serves} model" in ran(
            *BUILD, "serve", *its, "--port", str(port), "--detach"
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as response:
            names = {model["id"] for model in json.load(response)["data"]}
        assert names == ({"tiny", "tiny-base"} if serves == "tuned" else {"tiny"})
        again = subprocess.run(
            [*BUILD, "serve", *its, "--port", str(port), "--detach"], capture_output=True, text=True
        )
        assert again.returncode == 1 and f"port {port}, which cannot be used" in again.stderr
    finally:
        assert "stopped" in ran(*BUILD, "serve", *its, "--stop")
