"""What compose reads: the service of compose.yaml, and the override that names the image."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import toy
import yaml

from forge import plan
from product import render, serving

ORIGIN = "recipe toy, key 0123456789ab, made 2026-11-28 06:50 UTC"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
DESCRIBED = {"service": "vllm-boat", "device": "cpu", "memory_gb": 21}
PACKAGE = """\
import json
from stages import job

def run(task):
    (task.output / "text.txt").write_text("flags")
    described = {"device": "cpu", "memory_gb": 21, "service": "vllm-nemotron-annie"}
    (task.output / "serve.json").write_text(json.dumps(described))
    tag = "annie/vllm-nemotron-annie:0123456789ab"
    (task.output / "image.json").write_text(json.dumps({"tag": tag}))

if __name__ == "__main__":
    job.main(run)
"""


def override(service, device):
    described = DESCRIBED | {"service": service, "device": device}
    return render.override(f"annie/{service}:0123456789ab", "0123456789abcdef", ORIGIN, described)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_compose_override_is_its_golden_copy(device):
    assert override(render.SERVICE, device) == (GOLDEN / f"compose.override.{device}.yaml").read_text()


def test_the_override_of_another_recipe_is_its_golden_copy():
    assert override("vllm-boat", "cuda") == (GOLDEN / "compose.override.other.yaml").read_text()


@pytest.mark.skipif(not shutil.which("docker"), reason="reads compose files with docker compose")
def test_compose_starts_the_service_of_another_recipe_as_it_would_start_annies(tmp_path):
    shutil.copy(GOLDEN.parents[1] / "compose.yaml", tmp_path)
    render.write_override(tmp_path, "annie/vllm-boat:0123456789ab", "0123456789abcdef", ORIGIN, DESCRIBED)
    words = ["docker", "compose", "--project-directory", str(tmp_path), "config", "--format=json"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    services = json.loads(shown.stdout)["services"]
    assert list(services) == ["vllm-boat"], "up alone starts nothing else"
    (tmp_path / render.OVERRIDE).unlink()
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    annie = json.loads(shown.stdout)["services"][render.SERVICE]
    changed = {"image", "environment", "mem_limit"}
    boat = services["vllm-boat"]
    assert {**boat, **dict.fromkeys(changed)} == {**annie, **dict.fromkeys(changed)}
    added = {"ANNIE_SERVER": "0123456789abcdef", "ANNIE_ORIGIN": ORIGIN}
    assert boat["environment"] == {**annie["environment"], **added}


def test_the_service_listens_on_loopback_only_and_without_privileges():
    service = yaml.safe_load((GOLDEN.parents[1] / "compose.yaml").read_text())["services"][
        "vllm-nemotron-annie"
    ]
    assert service["ports"] == ["${ANNIE_BIND:-127.0.0.1}:${ANNIE_PORT:-8000}:8000"]
    assert service["restart"] == "on-failure:5" and service["pids_limit"]
    assert service["cap_drop"] == ["ALL"] and service["read_only"] and "privileged" not in service


def test_a_run_points_compose_to_the_image_of_the_recipe_as_it_is(mini, command):
    folder = mini.repo / "stages" / serving.PACKAGE
    (mini.repo / "stages/count").rename(folder)
    (folder / "__main__.py").write_text(PACKAGE)
    toy.edit(
        mini.recipe,
        "  count: {}\n  slow:\n",
        f"  {serving.PACKAGE}: {{}}\n  slow:\n    inputs: {{count: {serving.PACKAGE}}}\n",
    )
    override = mini.repo / render.OVERRIDE
    command("run", "--until", "words")
    assert not override.exists()
    command("run")
    artifact = plan.artifact(mini.context(), serving.PACKAGE)
    key = artifact.key
    origin = f"recipe toy, key {key[:12]}, made {artifact.created:%Y-%m-%d %H:%M} UTC"
    golden = (GOLDEN / "compose.override.cpu.yaml").read_text()
    assert override.read_text() == golden.replace("0123456789abcdef", key).replace(ORIGIN, origin)
    toy.edit(mini.repo / "data/a.txt", "beta", "other")
    command("run")
    assert key not in override.read_text()
    toy.edit(mini.repo / "data/a.txt", "other", "beta")
    assert "nothing to do" in command("run")
    assert key in override.read_text(), "going back, compose starts the earlier image"


def test_a_run_without_an_engine_leaves_what_compose_reads(mini, command):
    folder = mini.repo / "stages" / serving.PACKAGE
    (mini.repo / "stages/count").rename(folder)
    toy.edit(
        mini.recipe,
        "  count: {}\n  slow:\n",
        f"  {serving.PACKAGE}: {{}}\n  slow:\n    inputs: {{count: {serving.PACKAGE}}}\n",
    )
    command("run")
    assert not (mini.repo / render.OVERRIDE).exists()
