from __future__ import annotations

import pytest


@pytest.fixture
def its(tmp_path):
    import toy

    return toy.Toy(tmp_path)
