"""The tensors that a config promises, against the published checkpoint."""

import hashlib
import json
import math
from pathlib import Path

import pytest

from model.families.nemotron_h import names

NANO = json.loads((Path(__file__).parent / "golden" / "nano-config.json").read_text())
# SHA-256 over "name d0xd1" lines, sorted, of the published BF16 checkpoint's own headers.
PUBLISHED = "2beea2ee83da0779e8f4c700e8a97414a731bdc37089cc9afae3c0406c6f0718"


def test_the_real_config_gives_every_published_tensor_by_name_and_shape():
    found = names.tensors(NANO)
    assert len(found) == 6243
    assert sum(math.prod(spec.shape) for spec in found.values()) == 31_577_940_288
    lines = sorted(f"{name} {'x'.join(map(str, spec.shape))}" for name, spec in found.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED


def test_float32_is_what_the_published_checkpoint_keeps_in_float32():
    found = names.tensors(NANO)
    assert sum(math.prod(spec.shape) for spec in found.values() if spec.dtype == "F32") == 5888


def test_a_config_without_its_pattern_is_refused():
    with pytest.raises(ValueError, match="hybrid_override_pattern"):
        names.pattern({})


def test_experts_map_to_their_stack():
    assert names.native("backbone.layers.1.mixer.experts.7.up_proj") == "model.layers.1.mixer.experts.up_proj"
