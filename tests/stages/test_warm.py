"""stages.train.warm trains, with random weights, all that stage train compiles: every kind of layer, full and
usual steps, held-out losses.
"""

import dataclasses
import json

import contracts
import pytest
import small

from model import layouts
from model.families.nemotron_h import nano
from model.layers import kernel_cache
from model.layers.projection import Projection
from stages import job
from stages.train import warm
from stages.train.loop import Loop


def params(**given):
    return contracts.defaults(
        "train", **{"rank": 4, "sequence_tokens": 256, "gradient_checkpointing": True, **given}
    )


def test_a_layer_of_each_kind_and_no_more():
    assert warm.shortest_pattern(nano.PATTERN) == "MEM*"
    assert [warm.shortest_pattern(pattern) for pattern in ("MEM*EMEM*E", "M*", "ME*", "MM*M", "EM")] == [
        "MEM*",
        "M*",
        "*ME",
        "MM*",
        "ME",
    ]


@pytest.mark.parametrize("pattern", [nano.PATTERN, "MEM*EMEM*EME", "EMEM*"])
def test_each_kind_is_held_as_in_the_whole_model(pattern):
    """In four bits or in BF16: the Mamba layer before attention stays BF16."""

    def held(letters):
        config = nano.WIDTHS | {"n_routed_experts": 2, "hybrid_override_pattern": letters}
        packed = {name.split(".", 2)[2] for name in layouts.quantised(config, "nvidia")}
        return {
            (letter, frozenset(name.split(".", 1)[1] for name in packed if name.startswith(f"{number}.")))
            for number, letter in enumerate(letters)
        }

    assert held(warm.shortest_pattern(pattern)) == held(pattern)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "qlora", "targets": "all"},
        {"targets": "all", "qat_share": 0.2, "qat_loss": "teacher", "ranks": 2},
    ],
)
def test_it_trains_a_full_and_a_usual_step(tmp_path, monkeypatch, given):
    base, data = small.base(tmp_path / "base", "MEM*EME"), small.data(tmp_path / "data")
    seen, real = [], Loop.step

    def step(self, number):
        rows = [self.rows[row] for row in self.order.step(number)]
        seen.append(([len(row["input_ids"]) for row in rows], len(self.model.model.layers)))
        real(self, number)

    monkeypatch.setattr(Loop, "step", step)
    task = small.job("warm", tmp_path, params(batch=3, **given), base=base, data=data)
    warm.train(task)
    assert seen == [([150, 106], 4), ([150, 150, 150], 4)]
    assert json.loads((tmp_path / "checkpoint-2/history.json").read_text())["held_out"].keys() == {"0", "2"}


def test_weights_are_held_decoded_as_in_the_recipe(tmp_path):
    base = small.base(tmp_path / "base", "MEM*EME")
    given = params(method="qlora", targets="all", decoded_gb=1.0)
    task = small.job("warm", tmp_path, given, base=base)
    model = warm.random_model(task, warm.model_config(task))
    packed = [its for its in model.modules() if isinstance(its, Projection) and its.form == "nf4"]
    assert packed and all(its.decoded is not None for its in packed)


def test_without_a_base_it_takes_nanos_shape_and_says_so(tmp_path, capsys):
    config = warm.model_config(small.job("warm", tmp_path, params()))
    assert (config["hidden_size"], config["hybrid_override_pattern"]) == (2688, "MEM*")
    task = small.job("data", tmp_path, params(sequence_tokens=512))
    assert (
        max(warm.conversation_lengths(task)) == 512
        and sum(warm.filling_lengths(warm.conversation_lengths(task), 512)) == 512
    )


@pytest.mark.parametrize(
    "device, folder, found",
    [("cpu", "somewhere", "device cpu"), ("cuda", None, "no folder in which kernels stay")],
)
def test_it_refuses_what_would_warm_nothing(tmp_path, monkeypatch, device, folder, found):
    monkeypatch.setattr(kernel_cache, "_prepared", folder)
    task = small.job("warm", tmp_path, params())
    with pytest.raises(job.StageError, match=found):
        warm.run(dataclasses.replace(task, device=device))
