"""kill -9 in the middle of the real stages: the next run goes on, and what it makes is whole."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml
from conftest import BUILD, HOME, REPO, ran

STEPS = 40


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A shorter tiny recipe in a store of its own, with the environments that are there already."""
    folder = tmp_path_factory.mktemp("line")
    recipe = yaml.safe_load((REPO / "recipes/tiny.yaml").read_text().replace("../data", f"{REPO}/data"))
    recipe["stages"]["base"] |= {"short_steps": 10, "steps": 10}
    recipe["stages"]["train"] |= {
        "steps": STEPS,
        "eval_every": 20,
        "save_every": 10,
        "warmup_steps": 5,
        "min_loss_drop": 0.0,
    }
    (folder / "short.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "home").mkdir()
    (folder / "home/envs").symlink_to(HOME.absolute() / "envs")
    return folder


def command(line, *words: str) -> list[str]:
    return [*BUILD, *words, "--recipe", str(line / "short.yaml"), "--executor", "local"]


def killed(line, stage: str, enough) -> None:
    """Runs up to quantize and kills forge with signal 9 as soon as `enough` holds for a progress event of
    `stage`.
    """
    process = subprocess.Popen(
        command(line, "run", "--until", "quantize", "--json"),
        cwd=REPO,
        env={**os.environ, "ANNIE_HOME": str(line / "home")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for text in process.stdout:
        event = json.loads(text)
        assert event["event"] != "failed", event
        if event["event"] == "progress" and event["stage"] == stage and enough(event):
            break
    process.kill()
    assert process.wait() == -9


@pytest.mark.trap("half-written-artifact")
def test_kill_9_in_train_and_in_quantize(line):
    home = line / "home"
    killed(line, "train", lambda event: event["done"] >= 25)
    assert "train" in ran(*command(line, "path", "train"), code=1, home=home)
    killed(line, "quantize", lambda event: event["note"].startswith("calibrating") and event["done"] >= 3)
    assert ran(*command(line, "path", "quantize"), code=1, home=home)

    # The run that went on to quantize took training up where its last whole checkpoint was.
    train = ran(*command(line, "path", "train"), home=home).strip()
    folder = max(p for p in (home / "runs").iterdir() if (p / "03-train.json").exists())
    events = [json.loads(text) for text in (folder / "events.jsonl").read_text().splitlines()]
    assert (
        min(
            e["done"]
            for e in events
            if e["event"] == "progress" and e.get("stage") == "train" and e["unit"] == "steps"
        )
        == 21
    )
    losses = [json.loads(text) for text in open(f"{train}/loss.jsonl")]
    assert [row["step"] for row in losses] == list(range(STEPS + 1))

    ran(*command(line, "run", "--until", "quantize"), home=home)
    quantised = ran(*command(line, "path", "quantize"), home=home).strip()
    assert json.load(open(f"{quantised}/audit.json"))["findings"] == []
    assert "nothing to do" in ran(*command(line, "run", "--until", "quantize"), home=home)
    assert list((home / "store/tmp").iterdir()) == []
