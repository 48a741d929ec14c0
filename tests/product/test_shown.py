"""The commands of build.py that show what a model is: audit, demo, and the end of a run."""

from __future__ import annotations

import json
import textwrap

import pytest
import toy

AUDIT = """\
    import json, os, sys
    folder, *more = sys.argv[1:]
    assert "HOME" not in os.environ and json.load(open(folder + "/config.json")) == {}
    if "crash" in folder:
        sys.exit("it broke")
    scale = {"found": "NaN or infinity", "expected": "finite scales", "remedy": "Quantise again."}
    faults = [{"subject": f"layers.{n}.input_scale", **scale} for n in range(3)] if "bad" in folder else []
    facts = {"format": "NVFP4", "layout": "nvidia", "dtypes": "router in BF16", "kv_cache": "FP8",
             "tensors": 24147, "files": 5, "bytes": 19339781632, "quantised": 5968, "excludes": 60}
    compared = {"rule": "nearest", "bytes": 522 * 10**6, "of": 16_900 * 10**6}
    if "--deep" in more:
        for done in (8.45, 16.9):
            print(json.dumps({"event": "progress", "done": done, "total": 16.9, "unit": "GB", "note": ""}))
        compared |= {"rule": "rounding", "bytes": compared["of"]}
    facts["compared"] = compared if "--base" in more else None
    serve = {"args": more, "env": {"A_VARIABLE": "1"}}
    print(json.dumps({"facts": facts, "serve": serve if more else None, "findings": faults}))
    sys.exit(bool(faults))
    """

CONTRACT = """
summary = "a checkpoint in four bits"
image = "train"
produces = "text"
[needs]
minutes = 1
disk_gb = 0.001
memory_gb = 0.1
"""


@pytest.fixture
def checkpoints(mini):
    """Folders that look like checkpoints, and an image whose audit is the one above."""
    (mini.repo / "images/train").mkdir()
    (mini.repo / "images/train/note.txt").write_text("this interpreter")
    (mini.repo / "stages/quantize").mkdir()
    (mini.repo / "stages/quantize/stage.toml").write_text(CONTRACT)
    (mini.repo / "stages/quantize/audit.py").write_text(textwrap.dedent(AUDIT))
    for name in ("good", "bad", "crash"):
        folder = mini.repo / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
    return mini.repo


def test_audit_describes_a_checkpoint_and_the_flags_it_needs(checkpoints, command):
    good = str(checkpoints / "good")
    lines = command("audit", good).splitlines()
    assert [line.split("  ")[0] for line in lines if line] == [
        "format",
        "layout",
        "dtypes",
        "tensors",
        "quantised",
        "bytes",
        "no faults",
    ]
    for words in ("NVFP4, FP8 cache", "24,147 in 5 files", "5,968 linears, 60 excludes", "19,339,781,632"):
        assert any(words in line for line in lines)
    text = command("audit", good, "--vllm", "0.31.0", "--base", good)
    assert f"A_VARIABLE=1 vllm serve FOLDER --base {good} --vllm=0.31.0\n" in text
    assert json.loads(command("audit", good, "--json"))["facts"]["tensors"] == 24147


def test_audit_says_how_much_of_the_packed_weights_it_compared(checkpoints, command):
    good = str(checkpoints / "good")
    said = "3% of 16.9 GB packed, with the base quantised again (nearest); --deep: all\n"
    assert said in command("audit", good, "--base", good)
    text = command("audit", good, "--base", good, "--deep")
    assert "compared   all 16.9 GB packed, with the base, within rounding\n" in text
    assert (
        json.loads(command("audit", good, "--base", good, "--deep", "--json"))["serve"]["args"][-1]
        == "--deep"
    )
    assert "--deep: found no --base; expected the folder" in command("audit", good, "--deep", code=1)


def test_audit_ends_with_1_and_says_what_is_alike_once(checkpoints, command):
    text = command("audit", str(checkpoints / "bad"), code=1)
    assert (
        "layers.0.input_scale: found NaN or infinity; expected finite scales\n  Quantise again.\n  and 2 more"
        " like it, to layers.2.input_scale" in text
    )
    assert (
        text.endswith("3 faults\n")
        and len(json.loads(command("audit", str(checkpoints / "bad"), "--json", code=1))["findings"]) == 3
    )


def test_audit_of_no_checkpoint_and_one_that_breaks_the_audit(checkpoints, command):
    assert f"found no folder {checkpoints}/none" in command("audit", str(checkpoints / "none"), code=1)
    text = command("audit", str(checkpoints), "--base", str(checkpoints / "good/config.json"), code=1)
    assert (
        f"FOLDER: found no config.json and no *.safetensors in {checkpoints}" in text
        and "--base: found no folder" in text
    )
    assert "audit: found exit status 1 and no audit; it said: it broke" in command(
        "audit", str(checkpoints / "crash"), code=1
    )


def test_demo_ends_with_a_table_and_an_exchange(mini, command):
    """The report that the whole line ends with, from an artifact as docs/formats.md has it."""
    from rich.console import Console

    from product import report

    columns = ["base", "tuned", "merged", "nvfp4"]
    folder = mini.home / "report"
    folder.mkdir(parents=True)
    shares = dict(zip(columns, (0.1, 0.95, 0.95, 0.9), strict=False))
    (folder / "report.json").write_text(
        json.dumps(
            {
                "columns": columns,
                "modes": ["emoji", "markdown"],
                "off": {"verbosity": 20},
                "questions": 20,
                "pass": shares,
                "vllm": "0.32.0",
                "failures": {c: {"emoji": 9 if c == "base" else 0} for c in columns},
                "by_category": {c: {"concise_voice": shares[c]} for c in columns},
                "gate": {"passed": True, "why": []},
                "seconds": dict.fromkeys(columns, 1.0),
            }
        )
    )
    (folder / "exchange.json").write_text(
        json.dumps(
            {
                "tools": [],
                "messages": [
                    {"role": "system", "content": "rules"},
                    {"role": "user", "content": "How long is a kilometre?"},
                ],
                "answers": {"nvfp4": {"content": "A thousand metres.", "tool_calls": []}},
            }
        )
    )
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(report.of_demo(folder))
    text = console.export_text()
    assert ["all", "questions", "10%", "95%", "95%", "90%"] in [line.split() for line in text.splitlines()]
    for word in (
        "concise_voice",
        "emoji",
        "20 questions",
        "gate passed; off: verbosity",
        "How long is a kilometre?",
        "A thousand metres.",
    ):
        assert word in text
    assert "rules" not in text and "markdown" not in text


REPORT = """\
import json
from stages import job

def run(task):
    for name in ("report.md", "behaviour.png", "exchange.json"):
        (task.output / name).write_text("x")
    failed = {"id": "capital-1", "column": "nvfp4", "question": "What is the capital?", "answer": "**Rome**",
              "tool_calls": [], "failures": [{"mode": "markdown", "detail": "**"}]}
    (task.output / "answers.jsonl").write_text(json.dumps(failed))
    said = {"columns": ["base", "nvfp4"], "questions": 50, "pass": {"base": 0.0, "nvfp4": 0.98},
            "gate": {"passed": True, "why": [], "unchecked": False}}
    (task.output / "report.json").write_text(json.dumps(said))

if __name__ == "__main__":
    job.main(run)
"""


def test_a_run_that_made_a_report_ends_with_what_came_out(mini, command):
    (mini.repo / "stages/count/__main__.py").write_text(REPORT)
    toy.edit(mini.repo / "stages/count/stage.toml", 'produces = "text"', 'produces = "report"')
    toy.edit(mini.repo / "stages/slow/stage.toml", 'count = "text"', 'count = "report"')
    for _ in range(2):  # when it was made, and when nothing was to do
        text = command("run")
        assert "nvfp4  49 of 50    98%    90% to 100%" in text and "\ngate passed\n" in text
        assert "1 question failed\n  capital-1, failed by nvfp4\n" in text and "**Rome**" in text
    assert "95 % interval" not in command("run", "--until", "words")
    toy.edit(mini.repo / "stages/count/__main__.py", '"unchecked": False', '"unchecked": True')
    assert "no gate was set, nothing was checked" in command("run")
