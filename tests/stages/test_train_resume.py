"""Training that was killed goes on as if nothing had happened, and never from half a checkpoint."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import short
import torch

from stages.train import checkpoints, fit, pack

REPO = Path(__file__).resolve().parents[2]
# Four steps an epoch and a checkpoint every five: a resumed run begins in the middle of an epoch that is not
# the first. The base is BF16 and in 4 bits, where libraries would round the adapter.
RUN = {
    "batch": 2,
    "sequence_tokens": 144,
    "steps": 15,
    "save_every": 5,
    "eval_every": 5,
    "method": "qlora",
    "precision": "bfloat16",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short.inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A run that nobody interrupted. Its scratch holds checkpoints 10 and 15."""
    task = short.task(tmp_path_factory.mktemp("whole"), made, **RUN)
    fit.run(task)
    return task


@pytest.fixture
def again(whole, tmp_path):
    """The same run about to start again, on a copy of its scratch."""
    shutil.copytree(whole.scratch, tmp_path / "scratch", ignore=shutil.ignore_patterns("train-output"))
    (tmp_path / "output").mkdir()
    return replace(whole, scratch=tmp_path / "scratch", output=tmp_path / "output")


def assert_same(output, whole):
    assert short.losses(output) == pytest.approx(short.losses(whole.output), abs=1e-5)
    assert short.losses(output, "held_out") == pytest.approx(short.losses(whole.output, "held_out"), abs=1e-5)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / "adapter" / name).read_bytes() == (whole.output / "adapter" / name).read_bytes()


def without_seal(folder):
    (folder / checkpoints.SEAL).unlink()


def half_a_seal(folder):
    seal = folder / checkpoints.SEAL
    seal.write_text(seal.read_text()[:40])


def half_a_file(folder):
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def a_changed_byte(folder):
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 128  # the sign of one number
    file.write_bytes(content)


def a_missing_file(folder):
    (folder / "history.json").unlink()


def a_missing_file_that_no_seal_names(folder):
    seal = folder / checkpoints.SEAL
    digests = json.loads(seal.read_text())
    seal.write_text(json.dumps({name: digest for name, digest in digests.items() if name != "history.json"}))


def another_seal(folder):
    (folder / checkpoints.SEAL).write_text("[]")


def a_seal_alone(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / checkpoints.SEAL).write_text("{}")


DAMAGES = [
    *(without_seal, half_a_seal, another_seal, a_seal_alone),
    *(half_a_file, a_changed_byte, a_missing_file, a_missing_file_that_no_seal_names),
]


@pytest.mark.trap("damaged-checkpoint-resumed")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(again, monkeypatch, damage):
    warnings = short.warnings(monkeypatch)
    damage(again.scratch / "checkpoint-15")
    assert fit.newest_checkpoint(again.scratch) == again.scratch / "checkpoint-10"
    assert warnings == ["checkpoint-15 is damaged: its files are not those that were saved"]


@pytest.mark.trap("damaged-checkpoint-resumed")
def test_a_changed_checkpoint_would_train_another_adapter_without_a_word(again, whole, monkeypatch):
    shutil.rmtree(again.scratch / "checkpoint-15")
    a_changed_byte(again.scratch / "checkpoint-10")
    monkeypatch.setattr(checkpoints, "is_whole", lambda folder: True)
    fit.run(again)
    assert any(
        not torch.equal(value, short.weights(whole.output)[name])
        for name, value in short.weights(again.output).items()
    )


def test_with_no_whole_checkpoint_training_starts_over(again, whole, monkeypatch):
    warnings = short.warnings(monkeypatch)
    without_seal(again.scratch / "checkpoint-10")
    half_a_file(again.scratch / "checkpoint-15")
    fit.run(again)
    assert [w.split()[0] for w in warnings if "damaged" in w] == ["checkpoint-15", "checkpoint-10"]
    assert_same(again.output, whole)
    assert checkpoints.newest(again.scratch) == (again.scratch / "checkpoint-15", []), "not saved anew"


def test_later_damaged_checkpoints_take_no_place_of_whole_ones(again, monkeypatch):
    short.warnings(monkeypatch)
    for step in (20, 25):
        (again.scratch / f"checkpoint-{step}").mkdir()
    without_seal(again.scratch / "checkpoint-15")
    fit.run(again)
    assert {path.name for path in again.scratch.glob("*checkpoint*")} == {"checkpoint-10", "checkpoint-15"}


def test_a_run_killed_after_its_last_step_has_nothing_left_to_train(again, whole):
    fit.run(again)
    assert_same(again.output, whole)


@pytest.mark.trap("resumed-run-differs")
def test_a_resumed_run_equals_an_uninterrupted_one(again, whole):
    shutil.rmtree(again.scratch / "checkpoint-15")
    fit.run(again)
    assert_same(again.output, whole)


@pytest.mark.trap("resumed-run-differs")
def test_so_it_does_on_a_base_that_is_not_in_four_bits(made, tmp_path):
    whole = short.task(tmp_path, made, **{**RUN, "method": "lora"})
    fit.run(whole)
    shutil.rmtree(tmp_path / "checkpoint-15")
    again = replace(whole, output=tmp_path / "again")
    again.output.mkdir()
    fit.run(again)
    assert_same(again.output, whole)


@pytest.mark.trap("resumed-run-differs")
def test_an_order_that_forgets_where_it_was_goes_on_with_other_rows(again, whole, monkeypatch):
    right = pack.Order.step
    monkeypatch.setattr(pack.Order, "step", lambda self, number: right(self, number - 10))
    shutil.rmtree(again.scratch / "checkpoint-15")
    fit.run(again)
    assert short.losses(again.output) != pytest.approx(short.losses(whole.output), abs=1e-3)


@pytest.mark.trap("resumed-run-differs")
def test_a_run_by_tokens_goes_on_with_the_steps_that_it_would_have_had(made, tmp_path):
    whole = short.task(tmp_path, made, **{**RUN, "batch_tokens": 200})
    fit.run(whole)
    shutil.rmtree(tmp_path / "checkpoint-15")
    again = replace(whole, output=tmp_path / "again")
    again.output.mkdir()
    fit.run(again)
    assert_same(again.output, whole)


def start(task, path):
    """The stage as every executor starts it."""
    path.write_text(json.dumps(asdict(task), default=str))
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train", str(path)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.trap("resumed-run-differs")
def test_a_killed_run_goes_on_to_the_same_adapter(made, whole, tmp_path):
    task = short.task(tmp_path, made, **RUN)
    with start(task, tmp_path / "job.json") as process:
        for line in process.stdout:
            event = json.loads(line)
            if (
                event["event"] == "progress"
                and event["unit"] == "steps"
                and event["done"] > RUN["save_every"]
            ):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL and not (task.output / "adapter").exists()
    found, _ = checkpoints.newest(task.scratch)

    with start(task, tmp_path / "job.json") as process:
        events = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert [
        event["done"] for event in events if event["event"] == "progress" and event["unit"] == "steps"
    ] == list(range(checkpoints.step_number(found) + 1, 16))
    assert_same(task.output, whole)


@pytest.mark.trap("resumed-run-differs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_from_there(made, whole, tmp_path, number):
    task = short.task(tmp_path, made, **RUN)
    with start(task, tmp_path / "job.json") as process:
        events = []
        for event in map(json.loads, process.stdout):
            events.append(event)
            if event["event"] == "progress" and event["unit"] == "steps" and event["done"] == 6:
                process.send_signal(number)
    assert process.returncode == 1
    found, _ = checkpoints.newest(task.scratch)
    step = checkpoints.step_number(found)
    assert step in range(6, 10), "no step at which it would save anyway"
    assert events[-1]["found"] == f"a signal to stop after step {step}, whose checkpoint is saved"
    fit.run(task)
    assert_same(task.output, whole)


DIES_IN_ITS_SAVE = """
import os, pathlib, signal, sys, torch
from stages import job
from stages.train import fit

right = torch.save
def save(value, path, *arguments, **keywords):
    right(value, path, *arguments, **keywords)
    if pathlib.Path(path).parent.parent.joinpath("checkpoint-5").is_dir():
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
fit.run(job.read(sys.argv[1]))
"""


def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_save_before(
    made, whole, tmp_path, monkeypatch
):
    task = short.task(tmp_path, made, **RUN)
    (tmp_path / "job.json").write_text(json.dumps(asdict(task), default=str))
    code = subprocess.run(
        [sys.executable, "-c", DIES_IN_ITS_SAVE, str(tmp_path / "job.json")], cwd=REPO, capture_output=True
    ).returncode
    assert code == -signal.SIGKILL
    assert {path.name for path in task.scratch.glob("*checkpoint*")} == {
        "checkpoint-5",
        checkpoints.UNFINISHED,
    }
    warnings = short.warnings(monkeypatch)
    assert fit.newest_checkpoint(task.scratch) == task.scratch / "checkpoint-5"
    assert not warnings, "nothing was damaged"
    fit.run(task)
    assert not (task.scratch / checkpoints.UNFINISHED).exists()
    assert_same(task.output, whole)


UNEVEN = {"batch": 3, "sequence_tokens": 150}  # in some steps one rank has two sequences and the other one
BY_TOKENS = {"batch_tokens": 250, "sequence_tokens": 150}


@pytest.mark.trap("loss-not-divided-by-accumulation")
@pytest.mark.parametrize(
    ("ranks", "sharded"),
    [
        ((2, 2), {}),
        ((2, 1), {}),
        ((1, 2), {}),
        ((2, 2), {"method": "nvfp4", **UNEVEN}),
        ((2, 1), UNEVEN),
        ((1, 2), BY_TOKENS),
    ],
)
def test_two_ranks_have_the_losses_of_one_and_another_number_goes_on(made, tmp_path, ranks, sharded):
    """gloo on this machine, through torchrun as a recipe's `ranks` starts it; the second number of ranks
    resumes from step 5.

    Sharded, two ranks hold the base between them.
    """
    settings = {**RUN, "batch": 8, "steps": 10, "method": "lora", "precision": "float32", **sharded}
    alone = short.task(tmp_path / "alone", made, **settings)
    fit.run(alone)
    task = short.task(tmp_path / "shared", made, **settings)
    for attempt, count in enumerate(ranks):
        task = replace(task, params={**task.params, "ranks": count, "sharded": bool(sharded) and count > 1})
        with start(task, tmp_path / "job.json") as process:
            events = [json.loads(line) for line in process.stdout if line.startswith("{")]
        assert process.returncode == 0, events[-1:]
        if attempt == 0:
            shutil.rmtree(task.scratch / "checkpoint-10")
            for path in list(task.output.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert short.losses(task.output) == pytest.approx(short.losses(alone.output), abs=1e-5)
    # As a whole: where a gradient is next to nothing, Adam makes a whole step of the rounding of a sum taken
    # in another order.
    wanted = short.weights(alone.output)
    assert all(
        (value - wanted[name]).norm() < 1e-2 * wanted[name].norm()
        for name, value in short.weights(task.output).items()
    )
