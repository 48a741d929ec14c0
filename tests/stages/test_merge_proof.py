"""What stage merge asks of a merge: a wrong place or scale is refused by name; rounding to BF16 and idle
experts are no fault.
"""

import json
import sys
from pathlib import Path

import adapters
import pytest
import small
import torch
from adapters import DOWN, UP, facts, merged, saved, task, trained
from safetensors.torch import load_file, save_file

from model.lora import Adapter, Change
from model.weights.checkpoint import Checkpoint
from model.weights.lora_config import LoraSettings
from stages.job import StageError
from stages.merge import merge, proof
from stages.merge.rounding import Agreement, compare

ALL = {
    "target_modules": [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
    ],
    "target_parameters": [UP, DOWN],
}
EXPERT = "backbone.layers.1.mixer.experts.{}.{}.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    small.base(folder / "base", "*E")
    return {
        "base": folder / "base",
        "data": small.data(folder / "data"),
        "train": saved(folder / "train", trained(folder / "base", **ALL)),
    }


def altered(patch, change):
    """Lets the stage find its merged files altered: `change` is given their tensors by name, and alters
    some.
    """
    right = merge.stream

    def stream(base, adapter, output):
        changed = right(base, adapter, output)
        for file in base.files:
            values = load_file(output / file)
            values |= change(
                Checkpoint(base.folder),
                {name: Checkpoint(output).tensor(name) for name in base.entries},
                values,
            )
            save_file(values, output / file, metadata={"format": "pt"})
        return changed

    patch.setattr(merge, "stream", stream)


def halved(name):
    return lambda base, whole, values: {
        key: (base.tensor(key).float() + (whole[key].float() - base.tensor(key).float()) / 2).bfloat16()
        for key in values
        if key == name
    }


def exchanged(one, two):
    return lambda base, whole, values: {
        key: whole[other] for key, other in ((one, two), (two, one)) if key in values
    }


FAULTS = {
    "a halved scale": (halved("backbone.layers.0.mixer.q_proj.weight"), "layers.0.mixer.q_proj.weight"),
    "an expert's halved scale": (halved(EXPERT.format(2, "up_proj")), EXPERT.format(2, "up_proj")),
    "two experts exchanged": (
        exchanged(EXPERT.format(1, "down_proj"), EXPERT.format(3, "down_proj")),
        EXPERT.format(1, "down_proj"),
    ),
    "a matrix transposed": (
        lambda base, whole, values: {
            key: whole[key].t().contiguous() for key in values if key.endswith("0.mixer.q_proj.weight")
        },
        "q_proj.weight",
    ),
    "one element": (
        lambda base, whole, values: {
            key: torch.where(
                torch.arange(values[key].numel()).view(values[key].shape) == 77,
                2 * values[key] + 1,
                values[key],
            )
            for key in values
            if key == EXPERT.format(0, "up_proj")
        },
        EXPERT.format(0, "up_proj"),
    ),
    "one unit in the last place": (
        lambda base, whole, values: {
            key: (
                (
                    values[key].view(torch.int16)
                    + (torch.arange(values[key].numel()).view(values[key].shape) == 77)
                )
                .to(torch.int16)
                .view(torch.bfloat16)
            )
            for key in values
            if key == EXPERT.format(0, "up_proj")
        },
        EXPERT.format(0, "up_proj"),
    ),
}


@pytest.mark.parametrize("tokens", [0, 60])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_merged_files_is_refused_by_name(made, tmp_path, monkeypatch, fault, tokens):
    change, name = FAULTS[fault]
    altered(monkeypatch, change)
    with pytest.raises(StageError, match=f"{name} is not the base with the adapter's change"):
        merged(tmp_path, made, made["train"], proof_tokens=tokens)


def test_a_scale_read_wrongly_is_refused_by_name(made, tmp_path, monkeypatch):
    right = LoraSettings.rank_and_scale
    monkeypatch.setattr(
        LoraSettings,
        "rank_and_scale",
        lambda self, module: (
            right(self, module)[0],
            right(self, module)[1] / (2 if "o_proj" in module else 1),
        ),
    )
    with pytest.raises(
        StageError,
        match=r"o_proj\.weight is not the base with the adapter's change: .* by 0\.5. of the change",
    ):
        merged(tmp_path, made, made["train"])


def test_experts_read_in_another_order_are_refused_by_name(made, tmp_path, monkeypatch):
    right = Adapter.change

    def rank_major(self, name):
        change, pair = right(self, name), self.pairs[name]
        if pair.expert is None:
            return change
        return Change(
            change.a,
            self.tensor(pair.b).reshape(-1, pair.experts, pair.rank)[:, pair.expert].contiguous(),
            change.scale,
        )

    monkeypatch.setattr(Adapter, "change", rank_major)
    with pytest.raises(StageError, match=r"experts\.0\.up_proj\.weight is not the base"):
        merged(tmp_path, made, made["train"])


def test_the_forward_names_the_layer_where_weights_alone_were_not_looked_at(made, tmp_path, monkeypatch):
    altered(monkeypatch, halved("backbone.layers.1.mixer.shared_experts.down_proj.weight"))
    monkeypatch.setattr(
        proof,
        "compare",
        lambda name, weight, applied, merged, agreement: torch.equal(applied.to(merged.dtype), merged),
    )
    with pytest.raises(StageError, match="the hidden states after layer 1 of the merged model are off by"):
        merged(tmp_path, made, made["train"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_small_change_that_bf16_halves_is_accepted(made, tmp_path, precision):
    """Of a change of 0.3 % of a weight, rounding to BF16 loses a quarter or more; a constant bound of 0.25
    refused it.
    """
    folder = saved(tmp_path, trained(made["base"], size=2e-5, **ALL))
    output = merged(tmp_path, made, folder, proof_precision=precision)
    found = facts(output)
    assert found["merge_error"] == found["rounding_error"] > 0.25 * found["adapter_effect"]
    before, after = Checkpoint(made["base"]), Checkpoint(output)
    assert any(not before.same_bits(name, after) for name in before.entries)


def without(folder, chosen):
    """The adapter with B zero for the experts and modules that `chosen` names: (key, expert or None)."""
    file = folder / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    for key, expert in chosen:
        part = state[key].view(len(state[key]), -1, 4)[:, :, expert] if expert is not None else state[key]
        part.zero_()
    save_file(state, file)
    return folder


def test_idle_experts_are_listed_and_no_fault(made, tmp_path, monkeypatch):
    stack = "base_model.model.model.layers.1.mixer.experts.lora_B.weight"
    folder = without(saved(tmp_path, trained(made["base"], **ALL)), [(stack, 1), (stack, 3)])
    messages = adapters.warnings(monkeypatch)
    output = merged(tmp_path, made, folder)
    idle = [EXPERT.format(1, "down_proj"), EXPERT.format(3, "down_proj")]
    assert facts(output)["idle"] == idle and facts(output)["too_small"] == []
    assert (
        len(messages) == 1 and "leaves 2 of 14 tensors as they are" in messages[0] and idle[0] in messages[0]
    )
    assert all(Checkpoint(output).same_bits(name, Checkpoint(made["base"])) for name in idle)


def scaled(folder, share, part):
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file(
        {
            key: value * share if "lora_B" in key and part in key else value
            for key, value in load_file(file).items()
        },
        file,
    )
    return folder


@pytest.mark.trap("change-rounded-away-in-bf16")
def test_a_change_too_small_for_bf16_is_called_that(made, tmp_path, monkeypatch):
    messages = adapters.warnings(monkeypatch)
    output = merged(tmp_path, made, scaled(saved(tmp_path, trained(made["base"], **ALL)), 1e-20, "k_proj"))
    assert (
        facts(output)["too_small"] == ["backbone.layers.0.mixer.k_proj.weight"]
        and facts(output)["idle"] == []
    )
    assert "too small for BF16 in 1 of 14 tensors" in messages[0]


@pytest.mark.trap("change-rounded-away-in-bf16")
def test_an_adapter_that_bf16_rounds_away_is_refused(made, tmp_path):
    with pytest.raises(StageError, match="too small for BF16 in all of its 14 tensors"):
        merged(tmp_path, made, scaled(saved(tmp_path, trained(made["base"], **ALL)), 1e-20, ""))


def test_an_adapter_that_changes_no_logit_is_refused():
    """Its weights may change all the same: where no token of the sample goes."""
    logits = [torch.randn(3, 8), torch.randn(2, 8)]
    with pytest.raises(StageError, match="an adapter that changes no logit"):
        proof.judge_logits(logits, logits, logits, logits)


def test_the_order_of_a_sum_decides_next_to_the_middle_of_two_numbers_only():
    weight = torch.ones(2, 3).bfloat16()
    applied = torch.full(
        (2, 3), 1 + 2**-8
    )  # the middle between 1 and the next BF16 number, which is 1 + 2**-7
    agreement = Agreement()
    assert not compare("name", weight, applied, torch.full((2, 3), 1 + 2**-7).bfloat16(), agreement)
    assert agreement == Agreement(tensors=1, equal=0, by_order=6)
    with pytest.raises(StageError, match="name is not the base"):
        compare("name", weight, applied - 2**-12, torch.full((2, 3), 1 + 2**-7).bfloat16(), agreement)


def test_what_was_compared_stands_in_merge_json(made, tmp_path):
    found = facts(merged(tmp_path, made, made["train"]))["compared_with_peft"]
    assert found == {
        "version": found["version"],
        "layers": ["0", "1"],
        "tensors": 14,
        "equal": 14,
        "by_order": 0,
    }


def test_a_stage_started_as_the_line_starts_it_ends_with_an_error_event_and_no_traceback(made, tmp_path):
    import subprocess

    its = task(tmp_path, made, tmp_path / "nothing")
    described = {
        "stage": "merge",
        "params": its.params,
        "inputs": {name: str(path) for name, path in its.inputs.items()},
        "output": str(its.output),
        "scratch": str(tmp_path),
        "seed": 0,
    }
    (tmp_path / "job.json").write_text(json.dumps(described))
    run = subprocess.run(
        [sys.executable, "-m", "stages.merge", str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    last = json.loads(run.stdout.splitlines()[-1])
    assert (
        run.returncode == 1
        and last["event"] == "error"
        and "there is no adapter_config.json" in last["found"]
        and "Traceback" not in run.stderr
    )
