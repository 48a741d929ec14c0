from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]


@pytest.fixture
def its(tmp_path):
    import toy

    return toy.Toy(tmp_path)
