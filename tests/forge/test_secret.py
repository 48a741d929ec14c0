"""Secrets that no recipe names: where they are found, and where they go."""

from __future__ import annotations

import pytest
import toy

from forge import preflight, secret

TOKEN = "s3cret-of-many-letters"


@pytest.fixture
def asking(mini, monkeypatch, tmp_path):
    """The toy whose stage `words` takes a token from a variable or a file, and has the network."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("A_TOKEN", "A_HOME"):
        monkeypatch.delenv(name, raising=False)
    contract = mini.repo / "stages/words/stage.toml"
    places = 'variable = "A_TOKEN"\nfiles = ["$A_HOME/token", "~/.cache/token"]'
    toy.edit(contract, 'doc = "a token"', f'doc = "a token"\n{places}')
    toy.edit(mini.recipe, "upper: false", "upper: false\n    needs: {network: true}")
    return mini


def found(its):
    return [(one.name, one.place) for one in secret.found(its.context().recipe)]


def test_the_variable_comes_first_then_the_files_in_their_order(asking, monkeypatch, tmp_path):
    assert found(asking) == []
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/token").write_text(TOKEN)
    assert found(asking) == [("token", f"{tmp_path}/.cache/token")]
    monkeypatch.setenv("A_HOME", str(tmp_path / "elsewhere"))
    assert found(asking) == [("token", f"{tmp_path}/.cache/token")]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/token").write_text(TOKEN)
    assert found(asking) == [("token", f"{tmp_path}/elsewhere/token")]
    monkeypatch.setenv("A_TOKEN", " ")
    assert found(asking) == [("token", f"{tmp_path}/elsewhere/token")], "a blank variable holds none"
    monkeypatch.setenv("A_TOKEN", TOKEN)
    assert found(asking) == [("token", "the variable A_TOKEN")]


def test_a_recipe_that_names_one_and_a_stage_without_the_network_get_no_other(asking, monkeypatch):
    monkeypatch.setenv("A_TOKEN", TOKEN)
    (asking.repo / "own.txt").write_text("own")
    toy.edit(asking.recipe, "seed: 3", "seed: 3\nsecrets: {token: ../own.txt}")
    assert found(asking) == []
    toy.edit(asking.recipe, "secrets: {token: ../own.txt}", "")
    assert found(asking)
    toy.edit(asking.recipe, "network: true", "network: false")
    assert found(asking) == []


def test_a_variable_reaches_its_stage_as_a_file_that_is_gone_afterwards(asking, monkeypatch):
    monkeypatch.setenv("A_TOKEN", TOKEN)
    keys = [stage.key.sha256 for stage in asking.plan().stages]
    folder = asking.run().folder
    assert "the token is [secret]" in asking.log("words")
    assert not any(TOKEN in path.read_text() for path in folder.iterdir())
    left = [path for path in asking.home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert left == [] and not list(asking.home.rglob("secrets-*"))
    monkeypatch.delenv("A_TOKEN")
    assert asking.plan().stages[0].key.sha256 == keys[0], "it is in no key"


def test_what_was_found_is_said_before_the_run(asking, monkeypatch):
    monkeypatch.setenv("A_TOKEN", TOKEN)
    context = asking.context()
    findings = preflight.findings(context.recipe, asking.plan(), asking.home, None, [])
    said = [finding.found for finding in findings if finding.subject == "secret token"]
    assert said == ["from the variable A_TOKEN, since the recipe names none"]


def test_the_file_is_for_this_user_alone_also_under_a_wide_umask(asking, monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", TOKEN)
    with secret.with_files(asking.context().recipe, tmp_path / "private") as recipe:
        path = recipe.secrets["token"]
        assert path.read_text() == TOKEN + "\n" and path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
