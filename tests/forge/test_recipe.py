"""Recipes: what is refused, and how the refusal reads."""

from __future__ import annotations

import pytest
import toy

from forge import recipe
from forge.finding import Refused


def faults(its):
    with pytest.raises(Refused) as refused:
        its.plan()
    return [str(f) for f in refused.value.findings]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "upper: false",
            "uper: false",
            "toy.yaml:7: found unknown key words.uper; expected a parameter of words. Did you mean upper?",
        ),
        ("upper: false", "upper: 3", "toy.yaml:7: found words.upper = 3; expected bool. shout"),
        (
            "upper: false",
            "upper: false\n    times: 12",
            "toy.yaml:8: found words.times = 12; expected int at least 1 and at most 9.",
        ),
        (
            "upper: false",
            "upper: false\n    times: true",
            "toy.yaml:8: found words.times = True; expected int at least 1",
        ),
        ("    upper: false\n", "", "toy.yaml:6: found no upper in words; expected upper: bool. shout"),
        (
            "steps: 3",
            "steps: 3\n    how: wel",
            "toy.yaml:12: found slow.how = 'wel'; expected one of well, badly",
        ),
        (
            "seed: 3",
            "seeed: 3",
            "toy.yaml:3: found unknown key seeed; expected a key of a recipe. Did you mean seed?",
        ),
        (
            "seed: 3",
            "seed: 3\nseed: 4",
            "toy.yaml:4: found seed a second time; expected each key once (the first is in line 3)",
        ),
        (
            "  slow:",
            "  slwo:",
            (
                "toy.yaml:10: found unknown stage slwo; expected a folder of stages/ with a stage.toml. Did"
                " you mean slow?"
            ),
        ),
        (
            "data/a.txt",
            "data/z.txt",
            "toy.yaml:8: found ../data/z.txt, which does not exist; expected a file or folder (text files)",
        ),
        (
            "files:",
            "file:",
            "toy.yaml:8: found unknown source file; expected a source of words. Did you mean files?",
        ),
        (
            "{minutes: 0.5}",
            "{minute: 0.5}",
            (
                "toy.yaml:12: found unknown key slow.needs.minute; expected a key of needs. Did you mean"
                " minutes?"
            ),
        ),
        (
            "  count: {}",
            "  count: {inputs: {words: wrds}}",
            (
                "from wrds, which the recipe does not have; expected a stage of this recipe. Did you"
                " mean words?"
            ),
        ),
        (
            "  count: {}",
            "  count: {inputs: {words: slow}}",
            "found stages that wait for each other (count -> slow); expected no cycle",
        ),
        (
            "plain: {base",
            "plane: {base",
            "toy.yaml:4: found unknown image plane; expected a folder of images/. Did you mean plain?",
        ),
        ("steps: 3", "steps: 3\n    seconds: .nan", "toy.yaml:12: found slow.seconds = nan; expected float"),
        ("name: toy", "name: to/y", "toy.yaml:1: found name = 'to/y'; expected letters"),
        ("name: toy", "name: to\0y", "toy.yaml: found"),
        ("name: toy", "name: [toy", "toy.yaml:2: found"),
    ],
)
def test_a_fault_names_its_line_and_the_nearest_valid_word(mini, old, new, said):
    toy.edit(mini.recipe, old, new)
    assert any(said in fault for fault in faults(mini)), faults(mini)


def test_a_path_that_counts_from_the_root_is_told_its_spelling_of_now(mini, tmp_path):
    toy.edit(mini.recipe, "../data/a.txt", "data/a.txt")
    toy.edit(mini.recipe, "seed: 3", "seed: 3\nsecrets: {token: data/a.txt}")
    said = "found data/a.txt, which does not exist; "
    remedy = "Paths count from the recipe's file and not from the repository's root: write ../data/a.txt"
    secret, source = faults(mini)
    assert secret.startswith(f"toy.yaml:4: {said}") and secret.endswith(remedy)
    assert source.startswith(f"toy.yaml:9: {said}") and source.endswith(remedy)
    mini.recipe = mini.recipe.rename(tmp_path / "toy.yaml")
    assert [fault.endswith(f"write {mini.repo}/data/a.txt") for fault in faults(mini)[:2]] == [True, True]


def test_paths_count_from_the_recipe_whatever_the_folder_one_works_in(mini, tmp_path, monkeypatch):
    keys = [stage.key for stage in mini.plan().stages]
    monkeypatch.chdir(mini.recipe.parent)
    mini.recipe = mini.recipe.relative_to(mini.recipe.parent)
    assert [stage.key for stage in mini.plan().stages] == keys
    own = tmp_path / "own folder"
    own.mkdir()
    for name in ("a.txt", "b"):
        (mini.repo / "data" / name).rename(own / name)
    text = mini.recipe.read_text().replace("../data/a.txt", "~/a.txt").replace("../data/", "./x/../")
    mini.recipe = own / "recipe.yaml"
    mini.recipe.write_text(text)
    monkeypatch.setenv("HOME", str(own))
    assert [stage.key for stage in mini.plan().stages] == keys
    assert mini.context().recipe.stages["words"].sources["files"] == (own / "a.txt", own / "b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("''", "found no source files in words"),
        ("['~nobody.here/a.txt']", "found ~nobody.here/a.txt, which does not exist"),
    ],
)
def test_no_path_and_the_home_of_nobody_are_named(mini, text, said):
    toy.edit(mini.recipe, "[../data/a.txt, ../data/b]", text)
    assert said in faults(mini)[0]


@pytest.fixture
def places(mini, tmp_path, monkeypatch):
    """A folder to work in, with recipes of each kind: signe/, and one beside others in drafts/."""
    here = tmp_path / "here"
    for name in ("signe/recipe.yaml", "drafts/one.yaml", "drafts/two.yml", "empty/notes.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(mini.recipe.read_text().replace("../data", f"{mini.repo}/data"))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("name", ["signe", "signe/", "./signe", "signe/recipe.yaml", "drafts/../signe"])
def test_a_recipe_is_found_as_a_folder_too(mini, places, name):
    found = recipe.find(name, mini.repo)
    assert found.resolve() == places / "signe/recipe.yaml"
    option = recipe.load(found, mini.repo).option
    assert recipe.find(option, mini.repo).resolve() == places / "signe/recipe.yaml"


def test_what_a_remedy_names_can_be_pasted(mini, places):
    (places / "signe").rename(places / "my signe")
    loaded = recipe.load(recipe.find("my signe", mini.repo), mini.repo)
    assert loaded.option == "'my signe'"
    assert recipe.load(recipe.find("toy", mini.repo), mini.repo).option == "toy"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "tooy",
            "found no recipe tooy, and no folder {here}/tooy; expected a name in recipes/, a",
        ),
        ("tooy", "or a .yaml file. Did you mean toy?"),
        ("nowhere/signe", "found no folder {here}/nowhere/signe; "),
        ("signe/signe.yaml", "found no file {here}/signe/signe.yaml; "),
        ("signe/signe.yaml", "Valid here: toy."),
        ("empty", "found no recipe.yaml in the folder {here}/empty; "),
        ("drafts", "Recipes there under other names: drafts/one.yaml, drafts/two.yml"),
        ("empty/notes.txt", "found the file {here}/empty/notes.txt, which is no .yaml file"),
        ("..", "found no recipe.yaml in the folder {here}/..; "),
    ],
)
def test_a_recipe_that_is_not_found_says_what_is_missing(mini, places, name, said):
    with pytest.raises(Refused) as refused:
        recipe.find(name, mini.repo)
    assert said.format(here=places) in str(refused.value)


def test_a_folder_of_a_recipes_name_is_not_taken_for_it(mini, places):
    (places / "signe").rename(places / "toy")
    with pytest.raises(Refused, match="two of the name toy: .*Write ./toy for the folder"):
        recipe.find("toy", mini.repo)
    assert recipe.find("./toy", mini.repo) == places.relative_to(places) / "toy/recipe.yaml"
    assert recipe.find(str(mini.recipe), mini.repo) == mini.recipe


def test_every_fault_is_named_at_once(mini):
    toy.edit(mini.recipe, "upper: false", "uper: 1")
    toy.edit(mini.recipe, "steps: 3", "steps: many")
    toy.edit(mini.recipe, "data/a.txt", "data/z.txt")
    assert len(faults(mini)) == 4  # the unknown key, the parameter that it leaves out, the path, the type


def test_a_stage_under_its_name_before_is_told_the_new_one(mini):
    toy.edit(mini.repo / "stages/count/stage.toml", "summary", 'was = "number"\nsummary')
    with pytest.raises(Refused, match="no stage number in recipe toy.*It is called count now"):
        mini.plan(last="number")
    toy.edit(mini.repo / "stages/words/stage.toml", "summary", "summery")  # one with faults is left out of it
    toy.edit(mini.recipe, "  count: {}", "  number: {}")
    with mini.recipe.open("a") as opened:
        opened.write("variants:\n  other: {number: {}}\n")
    said = [fault for fault in faults(mini) if "unknown stage number" in fault]
    assert (
        "toy.yaml:9: found unknown stage number; expected a folder of stages/ with a stage.toml." in said[0]
    )
    assert said[0].endswith("It is called count now.")


def test_the_recipes_that_say_image_are_told_package(mini, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text((toy.REPO / "recipes/tiny.yaml").read_text().replace("  package: {", "  image: {"))
    with pytest.raises(Refused, match="unknown stage image; .* It is called package now"):
        recipe.load(path, toy.REPO)


def test_an_input_of_another_type_is_refused(mini):
    toy.edit(mini.repo / "stages/count/stage.toml", 'words = "text"', 'words = "report"')
    assert "toy.yaml:9: found the text of words as input words of count; expected report" in faults(mini)[0]


def test_a_faulty_contract_is_named_by_its_file(mini):
    toy.edit(mini.repo / "stages/slow/stage.toml", "choices", "choises")
    toy.edit(mini.repo / "stages/count/stage.toml", 'produces = "text"', 'produces = "txet"')
    said = "\n".join(faults(mini))
    assert (
        "stages/slow/stage.toml: found unknown key parameters.how.choises" in said
        and "Did you mean choices?" in said
    )
    assert "stages/count/stage.toml: found produces = 'txet'" in said
    assert "expected an artifact type of stages/artifacts.toml. Did you mean text?" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "found no such file; expected the types of artifacts"),
        ("text = [", "found a fault of syntax: Invalid value (at end of document); expected TOML"),
        ("text = []", "found text = []; expected a list of names or patterns of files, at least one"),
        ('text = "text.txt"', "found text = 'text.txt'; expected a list"),
        ("[text]\nfiles = []", "found text = {'files': []}; expected a list"),
    ],
)
def test_faulty_artifact_types_are_named_by_their_file_and_once(mini, text, said):
    path = mini.repo / "stages/artifacts.toml"
    path.unlink() if text is None else path.write_text(text)
    (fault,) = faults(mini)
    assert fault.startswith("stages/artifacts.toml: ") and said in fault


def test_numbers_that_yaml_reads_as_words_are_numbers(mini):
    toy.edit(mini.recipe, "steps: 3", "steps: 3\n    seconds: 1e-3")
    assert mini.context().recipe.stages["slow"].params["seconds"] == 1e-3


def test_stages_may_stand_in_any_order(mini):
    text = mini.recipe.read_text()
    head, stages = text.split("stages:\n")
    words, rest = stages.split("  count: {}\n")
    mini.recipe.write_text(f"{head}stages:\n{rest.rstrip()}\n  count: {{}}\n{words}")
    assert list(mini.context().recipe.stages) == ["words", "count", "slow"]


def test_the_recipes_of_this_repository_read(mini):
    from forge import recipe

    for path in sorted((toy.REPO / "recipes").glob("*.yaml")):
        assert recipe.load(path, toy.REPO).name == path.stem


@pytest.mark.parametrize(
    "selected", [{"first": "slow", "last": "words"}, {"first": "count", "only": ("words",)}]
)
def test_a_selection_of_no_stage_is_refused(mini, selected):
    with pytest.raises(
        Refused,
        match=(
            "found no stage in --from .*; expected at least one stage. The stages in their order: words,"
            " count, slow."
        ),
    ):
        mini.plan(**selected)


def test_a_tab_is_named_in_one_sentence(mini):
    toy.edit(mini.recipe, "    upper: false", "\tupper: false")
    with pytest.raises(Refused) as refused:
        mini.context()
    said = str(refused.value)
    assert ": found a fault of syntax: character '\\t' that cannot start any token; expected YAML." in said
    assert "indent with blanks" in said
