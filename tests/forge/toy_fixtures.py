"""Fixtures on the miniature repository of toy.py, for the tests of the host's rooms."""

from __future__ import annotations

import pytest
from click.testing import CliRunner


@pytest.fixture
def mini(tmp_path):
    import toy

    return toy.Toy(tmp_path)


@pytest.fixture
def command(mini, monkeypatch):
    """`command(*words, code=0, recipe="toy")` runs a command of build.py on the miniature repository; gives
    its output.
    """
    import build

    monkeypatch.setattr(build, "REPO", mini.repo)
    monkeypatch.setenv("ANNIE_HOME", str(mini.home))
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words, code=0, recipe="toy"):
        result = CliRunner().invoke(build.cli, [*words, "--recipe", recipe, "--executor", "local"])
        assert result.exit_code == code, result.output
        return result.output

    return call
