"""Two recipe files of one name are told apart: their runs and artifacts go by the name."""

from __future__ import annotations

import pytest
import toy

from forge import journal, recipe, same_name


@pytest.fixture
def copy(mini, tmp_path):
    """A copy of the recipe outside of the repository, whose name was not changed."""
    folder = tmp_path / "mine"
    folder.mkdir()
    text = mini.recipe.read_text().replace("../data/a.txt, ../data/b", "a.txt")
    (folder / "recipe.yaml").write_text(text)
    (folder / "a.txt").write_text("words")
    return folder / "recipe.yaml"


def test_a_copy_whose_name_was_not_changed_is_named_by_each_command_once(mini, copy, command):
    found = "another recipe file with the name toy: "
    assert found not in command("run")
    for words in (("plan",), ("status",), ("run",), ("run",)):  # the second run has nothing to do
        said = command(*words, recipe=str(copy.parent)).replace("\n", "")
        assert said.count(found) == 1 and "Change `name:`" in said and str(mini.recipe) in said
    assert found in command("status")  # the copy has run from this home
    copy.write_text(copy.read_text().replace("name: toy", "name: mine"))
    assert found not in command("status") and found not in command("status", recipe=str(copy.parent))


def test_a_recipe_that_moved_is_no_other_recipe(mini, copy):
    mini.recipe = copy
    assert mini.run().code == 0
    (mini.repo / "recipes/toy.yaml").unlink()
    mini.recipe = copy.rename(copy.with_name("moved.yaml"))
    assert same_name.findings(mini.context()) == []


def test_a_run_keeps_its_recipe_as_it_was(mini):
    before = mini.recipe.read_text()
    assert mini.run().code == 0
    toy.edit(mini.recipe, "steps: 3", "steps: 4")
    (folder,) = journal.runs(mini.home, "toy")
    assert (folder / "recipe.yaml").read_text() == before
    assert journal.plan_of(folder)["recipe_file"] == str(mini.recipe)
    assert recipe.load(mini.recipe, mini.repo).text != before
