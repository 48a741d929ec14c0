from pathlib import Path

import pytest

from forge import render

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_compose_override_is_its_golden_copy(device):
    made = render.override("annie/vllm-nemotron-annie:0123456789ab", device)
    assert made == (GOLDEN / f"compose.override.{device}.yaml").read_text()


def test_the_service_listens_on_loopback_only_and_without_privileges():
    import yaml

    service = yaml.safe_load((GOLDEN.parents[1] / "compose.yaml").read_text())["services"]["vllm-nemotron-annie"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"] and service["read_only"] and "privileged" not in service
