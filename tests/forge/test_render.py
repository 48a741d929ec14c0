from pathlib import Path

import pytest

from forge import render

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_compose_override_is_its_golden_copy(device):
    made = render.override("annie/vllm-nemotron-annie:0123456789ab", device)
    assert made == (GOLDEN / f"compose.override.{device}.yaml").read_text()


def test_a_run_script_is_its_golden_copy(tmp_path):
    render.write_script(
        tmp_path / "03-train.sh",
        "train",
        "Its output goes where the job says.",
        [
            ["cd", "/home/annie/a clone"],
            ["exec", "env", "-i", "HOME=/tmp/home", "python", "-m", "stages.train", "03-train.json"],
        ],
    )
    assert (tmp_path / "03-train.sh").read_text() == (GOLDEN / "run.sh").read_text()
    assert (tmp_path / "03-train.sh").stat().st_mode & 0o111


def test_the_service_listens_on_loopback_only_and_without_privileges():
    import yaml

    service = yaml.safe_load((GOLDEN.parents[1] / "compose.yaml").read_text())["services"][
        "vllm-nemotron-annie"
    ]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"] and service["read_only"] and "privileged" not in service
