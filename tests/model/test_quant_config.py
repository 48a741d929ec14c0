"""The quantisation settings of a stranger's checkpoint."""

import json

import pytest

from model.weights import quant_config
from model.weights.paths import CheckpointError


@pytest.mark.parametrize(("length", "taken"), [(500, True), (501, False), (5000, False)])
def test_an_exclude_is_no_longer_than_can_be_read_in_no_time(tmp_path, length, taken):
    settings = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "[" * length]}}
    (tmp_path / quant_config.FILE).write_text(json.dumps(settings))
    if taken:
        (found,) = quant_config.read(tmp_path, {})
        assert found.excludes == ("lm_head", "[" * length)
    else:
        with pytest.raises(CheckpointError, match=rf"has a name of {length:,} characters"):
            quant_config.read(tmp_path, {})
