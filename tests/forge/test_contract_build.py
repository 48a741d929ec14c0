"""`[build]` of a contract: what the serving image is made from, by a parameter."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from forge import artifact_types, contract, recipe
from forge.executor import docker
from forge.finding import Refused
from forge.image import Image

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


def test_the_image_has_the_name_that_compose_starts():
    service = yaml.safe_load((REPO / "compose.yaml").read_text())["services"]["vllm-nemotron-annie"]
    for name in ("tiny", "annie"):
        step = recipe.load(REPO / f"recipes/{name}.yaml", REPO).stages["package"]
        assert service["image"] == f"{step.contract.product.repository(step.params)}:latest"


def test_another_recipe_has_an_image_and_a_model_of_its_own_name(tmp_path):
    text = (REPO / "recipes/tiny.yaml").read_text()
    text = re.sub(r"  package: .*", "  package: {}", text).replace("../data", str(REPO / "data"))

    def package(name):
        (tmp_path / "r.yaml").write_text(text.replace("name: tiny", f"name: {name}"))
        return recipe.load(tmp_path / "r.yaml", REPO).stages["package"]

    step = package("Boat.v2")
    assert step.contract.product.repository(step.params) == "annie/vllm-boat.v2"
    assert step.params["served_name"] == step.params["assistant"] == "Boat.v2"
    with pytest.raises(Refused, match=r"r.yaml:\d+: .*package.service = 'vllm-boat..v2'; .*single dots"):
        package("boat..v2")


def test_an_engine_is_given_the_name_with_its_version_and_as_the_latest(tmp_path, monkeypatch):
    builds, tagged = [], []
    executor = docker.Docker(REPO, tmp_path)
    built = SimpleNamespace(id="sha256:1", tag=lambda *words: tagged.append(words))
    executor._client = SimpleNamespace(images=SimpleNamespace(get={"some/thing:0123": built}.get))
    monkeypatch.setattr(executor, "_build", lambda *given: builds.append(given))
    folder = REPO / "images/serve"
    base = Image("serve", folder, {"base": "debian"})
    executor.build_product(base, base, {}, tmp_path, "some/thing:0123", {"a": "b"}, print)
    ((_, tag, _, _, _, labels, _),) = builds
    assert tag == "some/thing:0123" and tagged == [("some/thing", "latest")]
    assert labels["org.opencontainers.image.title"] == "thing" and labels["a"] == "b"
    assert json.loads((tmp_path / "image.json").read_text())["tag"] == "some/thing:0123"


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('checkpoint = "merge"', 'checkpoint = "marge"', "marge in build.contexts"),
        ("merged = {", "mergd = {", "build.contexts for nvfp4, mergd, tuned"),
        ('by = "serves"', 'by = "max_model_len"', "build.contexts for"),
        ("{service}", "{servce}", "servce in build.tag; .*Did you mean service"),
        ('by = "serves"\n', "", r"\[build\] with image, tag, contexts"),
    ],
)
def test_a_build_that_fits_no_parameter_or_input_is_refused(before, after, found, tmp_path):
    text = (REPO / "stages/package/stage.toml").read_text()
    assert before in text
    (tmp_path / "stage.toml").write_text(text.replace(before, after))
    with pytest.raises(Refused, match=found):
        contract.load(tmp_path, TYPES)
