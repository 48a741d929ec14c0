"""What stage train refuses before a base is downloaded, on the host and with the standard library alone."""

import json
import subprocess
import sys
from pathlib import Path

import contracts
import pytest

from stages.check import PlannedStage
from stages.job import StageError
from stages.train import check, limits
from stages.train.parameters import Parameters

REPO = Path(__file__).resolve().parents[2]
SHARDED, DECODED = "sharded with one process", "decoded_gb with method lora"


def findings(longest=2048, **changes):
    data = PlannedStage("data", {"max_tokens": longest})
    return list(
        check.check_parameters(
            PlannedStage("train", contracts.defaults("train", **changes), inputs={"data": data})
        )
    )


@pytest.mark.parametrize(
    ("changes", "parameter", "found"),
    [
        ({"sharded": True}, "sharded", SHARDED),
        ({"decoded_gb": 2.0}, "decoded_gb", DECODED),
        ({"qat_share": 0.2, "method": "qlora"}, "qat_share", "qat_share with method qlora"),
        ({"qat_share": 0.001}, "qat_share", "which is no step"),
        ({"qat_loss": "teacher"}, "qat_loss", "nothing to learn from it"),
        ({"steps": 2, "warmup_steps": 1}, "steps", "steps = 2"),
        ({"steps": 5}, "warmup_steps", "warmup_steps = 10, and 5 steps"),
    ],
)
def test_parameters_that_do_not_go_together_are_named(changes, parameter, found):
    [finding] = findings(**changes)
    assert finding.subject == f"train.{parameter}" and found in finding.found and finding.level == "error"
    assert finding.expected and finding.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 0},
        {"sharded": True, "ranks": 2},
        {"decoded_gb": 2.0, "method": "qlora"},
        {"qat_share": 0.2, "qat_loss": "teacher"},
        {"epochs": 1.0, "qat_share": 0.001, "warmup_steps": 500},  # it depends on the data
    ],
)
def test_others_are_not(changes):
    assert findings(**changes) == []


def test_several_are_named_at_once():
    assert [finding.found for finding in findings(sharded=True, decoded_gb=1.0)] == [SHARDED, DECODED]


@pytest.mark.parametrize("name", ["sequence_tokens", "batch_tokens"])
def test_conversations_that_data_keeps_and_train_cannot_hold_are_warned_of(name):
    [finding] = findings(longest=2048, **{name: 2047})
    assert (finding.subject, finding.level) == (f"train.{name}", "warning") and "2,048" in finding.found
    assert findings(longest=2048, **{name: 2048}) == []


@pytest.mark.parametrize(("steps", "found"), [(2, "which follows from epochs 0.5"), (5, "warmup_steps = 10")])
def test_the_stage_refuses_what_follows_from_epochs(steps, found):
    params = Parameters(**contracts.defaults("train", epochs=0.5))
    with pytest.raises(StageError, match=f"{found}.*aise epochs|{found}.*raise epochs"):
        limits.require(params, 1, steps)
    limits.require(params, 1, 10)


def test_it_runs_without_any_library():
    stage = {"stage": "train", "device": "cpu", "params": contracts.defaults("train", sharded=True)}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "stages.train.check"],
        input=json.dumps({**stage, "sources": {}}),
        env={"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["found"] == SHARDED and not done.stderr
