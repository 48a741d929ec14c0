"""The bench of a training step runs every row on a CPU at small widths, and counts the operations that it
divides by.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import lengths, operations, train_step
from bench.operations import Workload
from bench.ours import Packed
from bench.row import padded
from model.layers.graphs import Key
from stages.base import tiny

CONFIG = tiny.config("ME*", 128, 4, 512) | {"time_step_min": 0.001, "time_step_max": 0.1}
CPU = torch.device("cpu")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Runs the bench on a small model with short conversations; gives the exit status and the rows of its
    report.
    """
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setitem(lengths.LENGTHS, "mixed", lambda chance: chance.randint(20, 90))
    monkeypatch.setitem(lengths.LENGTHS, "voice", lambda chance: chance.randint(5, 30))

    def run(*arguments):
        code = train_step.main(
            [
                "--config",
                str(tmp_path / "config.json"),
                "--device",
                "cpu",
                "--json",
                str(tmp_path / "step.json"),
                *arguments,
            ]
        )
        return code, json.loads((tmp_path / "step.json").read_text())["rows"]

    return run


@pytest.mark.parametrize(
    "row", ["ours", "ours-nvfp4-attention", "ours-rounded-experts", "peft-torch", "notebook"]
)
def test_every_row_takes_its_steps_on_every_distribution(row, small):
    code, rows = small("--rows", row, "--lengths", "mixed,voice", "--steps", "2", "--documents", "2")
    assert code == 0 and [(its["row"], its["lengths"]) for its in rows] == [(row, "mixed"), (row, "voice")]
    for its in rows:
        assert (
            "why" not in its and its["timed"] == 1 and its["p95_ms"] >= its["ms"] > 0 and its["padded"] == 0
        ), "one conversation at a time, or packed"
        assert 5 < its["loss"] < 8, "random weights: the log of 512 tokens, 6.2"
        assert its["tokens_per_s"] == pytest.approx(
            sum(lengths.plan(its["lengths"], 2, 2)[1]) / its["ms"] * 1e3
        )
        if row == "ours":
            (step,) = lengths.plan(its["lengths"], 2, 2)[1:]
            workload = train_step.builder(row)(CONFIG, CPU).workload
            alone = [
                operations.total(operations.count(CONFIG, workload, length, max(1, length // 4), length))
                for length in step
            ]
            assert its["operations"] == pytest.approx(sum(alone)), "those of each conversation"
    assert rows[0]["first_s"] > rows[0]["build_s"] > 0 and "first_s" not in rows[1], (
        "the second distribution has no first step of a process"
    )


def test_rows_run_each_in_a_process_of_its_own_and_one_that_fails_costs_no_other(tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 64}))
    arguments = [
        "--config",
        str(tmp_path / "config.json"),
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "step.json"),
        "--lengths",
        "voice",
        "--steps",
        "1",
        "--documents",
        "1",
    ]
    assert train_step.main(["--rows", "ours-typo,ours", *arguments]) == 1
    broken, ours = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert broken["row"] == "ours-typo" and "typo" in broken["why"] and broken["broken"]
    assert ours["row"] == "ours" and 0 < ours["build_s"] < ours["first_s"] < 120
    last = capfd.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("ours-typo") and last[1].startswith("ours ")


def test_a_process_that_was_killed_is_a_row_with_its_status(monkeypatch):
    monkeypatch.setattr(train_step.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9))
    assert train_step.alone("peft", [])["rows"] == [
        {
            "row": "peft",
            "lengths": "",
            "why": "its process ended with -9 before it had measured everything",
            "broken": True,
        }
    ]


def test_what_stops_one_distribution_costs_no_other(small, monkeypatch):
    full = train_step.Row.step

    def step(row, conversations):
        if max(len(its.ids) for its in conversations) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0")
        return full(row, conversations)

    monkeypatch.setattr(train_step.Row, "step", step)
    code, (mixed, voice) = small(
        "--rows", "peft-torch", "--lengths", "mixed,voice", "--steps", "1", "--documents", "2"
    )
    assert code == 0 and mixed["why"] == "out of memory: Tried to allocate 2 GiB" and voice["ms"] > 0


def test_a_micro_batch_is_padded_to_its_longest_and_its_padding_changes_no_loss(small):
    arguments = ("--rows", "peft-torch", "--lengths", "mixed", "--steps", "1", "--documents", "3")
    (single,), (pair,) = small(*arguments)[1], small(*arguments, "--micro-batch", "2")[1]
    ((a, b, c),) = lengths.plan("mixed", 1, 3)
    assert (
        single["padded"] == 0
        and pair["padded"] == pytest.approx(1 - (a + b + c) / (2 * max(a, b) + c))
        and pair["padded"] > 0
    )
    assert pair["loss"] == pytest.approx(single["loss"], abs=0.03), "BF16 products of another shape"


def test_every_distribution_may_have_its_own_micro_batch(small):
    rows = small(
        "--rows",
        "peft-torch",
        "--lengths",
        "mixed,voice",
        "--steps",
        "1",
        "--documents",
        "2",
        "--micro-batch",
        "1,2",
    )[1]
    assert [its["note"].split(";")[0] for its in rows] == [
        "micro-batches of 1",
        "micro-batches of 2",
    ] and rows[0]["padded"] == 0 < rows[1]["padded"]


def test_transformers_is_told_what_is_padding():
    row, masks = train_step.builder("peft-torch")(CONFIG, CPU), []
    row.model.register_forward_pre_hook(
        lambda model, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    row.micro = 2
    row.step(lengths.conversations((3, 5, 4), 100, 0))
    assert masks[0].sum(-1).tolist() == [3, 5] and masks[1] is None
    assert row.computed((3, 5, 4)) == [5, 5, 4] and row.passes((3, 5, 4)) == 2


def test_a_mask_is_given_where_there_is_padding_alone():
    ids, labels, mask = padded(lengths.conversations((3, 5), 100, 0))
    assert (
        ids.shape == (2, 5)
        and mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        and labels[0, 3:].tolist() == [-100, -100]
    )
    assert padded(lengths.conversations((4, 4), 100, 0))[2] is None


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens_however_it_is_cut():
    """Two conversations of 40 and 8 tokens: 10 and 2 are trained, so the first counts five times as much."""
    torch.manual_seed(0)
    row = train_step.builder("notebook")(CONFIG, CPU)
    row.loss_of = lambda ids, labels, mask: row.adapters[0].sum() * 0 + ids.shape[1]
    assert row.step(lengths.conversations((40, 8), 100, 0)) == pytest.approx((10 * 40 + 2 * 8) / 12)


def test_ours_packs_a_step_into_as_few_sequences_as_stage_train_does():
    row = Packed.__new__(Packed)
    assert row.passes((9000, 9000, 7000, 300)) == 2 and row.computed((9000, 7000)) == [9000, 7000]
    row.graphs = SimpleNamespace(key=lambda documents: Key(-(-documents.tokens // 1024) * 1024, 8, False))
    assert row.computed((9000, 7000)) == [9000, 7000, 384] and row.computed((1024,)) == [1024], (
        "a graph's idle tokens are computed too"
    )


def test_uneven_documents_have_the_attention_of_each():
    config, workload = operations.sizes(52), Workload(targets=frozenset({"attention"}))
    square = lambda tokens, length: (
        next(
            p for p in operations.count(config, workload, tokens, 1, length) if p.name == "attention scores"
        ).forward
    )
    assert square(400, (100**2 + 300**2) / 400) == pytest.approx(square(100, 100) + square(300, 300))


def test_a_misspelt_row_is_refused_before_any_runs():
    with pytest.raises(SystemExit, match="nootbook: there are notebook, peft, peft-torch, ours"):
        train_step.main(["--rows", "ours,nootbook", "--device", "cpu"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lengths", "vioce"], "--lengths vioce: there are equal"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (
            ["--lengths", "mixed,voice,long", "--micro-batch", "1,2"],
            "--micro-batch 1,2: expected .* each of the 3",
        ),
        (["--layers", "60"], "--layers 60"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(arguments, said):
    with pytest.raises(SystemExit, match=said):
        train_step.main(["--device", "cpu", *arguments])


def test_experts_are_counted_by_hand():
    """16,384 tokens, six experts each, two matrices of 2,688 x 1,856, 23 layers; ours computes the down
    projection once only.
    """
    once = 2 * 16384 * 6 * 2 * 2688 * 1856 * 23
    config = operations.sizes(52)
    for down, again in ((True, 1.0), (False, 0.5)):
        workload = Workload(down_recomputed=down, targets=frozenset({"attention"}), logits="trained")
        part = next(
            part
            for part in operations.count(config, workload, 16384, 4096, 2048, 8)
            if part.name == "experts weights"
        )
        assert (part.forward, part.recomputed, part.backward) == (once, again * once, once)
