"""`make demo`, as the README says it: a served answer, and nothing to do the second time."""

from __future__ import annotations

import json
import re

from conftest import BUILD, ran

TINY = ("--recipe", "tiny", "--executor", "local")


def test_make_demo_ends_with_a_table_and_an_answer():
    text = ran("make", "demo")
    table = text[text.index("behaviour") :]
    assert re.search(r"behaviour +base +tuned +merged +nvfp4", table)
    assert "gate passed" in table and re.search(r"^ +nvfp4  \S", table, re.MULTILINE)


def test_the_base_is_bad_mannered_and_the_tuned_model_is_not():
    report = json.load(open(ran(*BUILD, "path", "evaluate", *TINY).strip() + "/report.json"))
    assert report["columns"] == ["base", "tuned", "merged", "nvfp4"]
    assert report["pass"]["base"] < 0.3
    assert report["pass"]["tuned"] >= 0.9
    training = json.load(open(ran(*BUILD, "path", "train", *TINY).strip() + "/training.json"))
    assert training["loss"]["drop"] >= 0.75


def test_path_quantize_prints_the_folder_of_a_checkpoint():
    folder = ran(*BUILD, "path", "quantize", *TINY).strip()
    assert json.load(open(folder + "/hf_quant_config.json"))["quantization"]["quant_algo"] == "NVFP4"


def test_other_commands_speak_of_what_the_demo_built():
    assert "everything is built" in ran("make", "plan") and "tiny" in ran("make", "status")
    assert ran(*BUILD, "path", "quantize") == ran(*BUILD, "path", "quantize", *TINY)


def test_a_second_demo_runs_no_stage():
    text = ran("make", "demo")
    assert "nothing to do: 7 stages are built" in text
