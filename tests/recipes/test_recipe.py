"""Recipes: what a file may say, and what is answered when it says something else."""

from pathlib import Path

import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.recipes.recipe import Recipe, load_recipe, packaged_recipes, parse_override

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").iterdir())


def test_default_recipe_loads():
    recipe = load_recipe()
    assert recipe == Recipe(name="python")  # what a recipe leaves out is the main job's value
    assert recipe.distill.layers < recipe.train.model.num_layers
    assert recipe.prune.pruning.sparsity == 0.5
    assert recipe.export.quantization.weights == "int8"


@pytest.mark.parametrize("path", [*packaged_recipes(), *EXAMPLES], ids=str)
def test_every_recipe_loads_and_survives_a_round_trip(path, tmp_path):
    import yaml

    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(copy) == recipe


def test_toml(tmp_path):
    (tmp_path / "x.toml").write_text('name = "t"\n[train.fit]\nsteps = 7\n')
    assert load_recipe(tmp_path / "x.toml").train.fit.steps == 7


def test_overrides():
    recipe = load_recipe(None, {"prune.pruning.sparsity": 0.7, "seed": 3})
    assert recipe.prune.pruning.sparsity == 0.7
    assert recipe.seed == 3
    assert parse_override("corpus.paths=[a.txt, b]") == ("corpus.paths", ["a.txt", "b"])
    assert parse_override("name=x=y") == ("name", "x=y")
    assert parse_override("prune.pruning.pattern=2:4") == ("prune.pruning.pattern", "2:4")
    assert parse_override("x={a: 4:8, b: 12, c: 1.5}")[1] == {"a": "4:8", "b": 12, "c": 1.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {}", "Unknown recipe key 'trian'. Did you mean 'train'?"),
        ("train: {fit: {stepps: 3}}", "'train.fit.stepps'. Did you mean 'train.fit.steps'"),
        ("train: {fit: {steps: many}}", "train.fit.steps"),
        ("train: {fit: {steps: 0}}", "steps"),
        ("prune: {pruning: {sparsity: 1.5}}", "sparsity"),
        ("export: {quantization: {weights: int9}}", "Did you mean 'int8'?"),
        ("train: 5", "'train' is a section"),
        ("train: [", "not valid YAML"),
        ("- a\n- b", "must hold"),
        ("name: ../up", "folder's name"),
        ("train: null", "'train' is a section"),
        ("distill: 3", "'distill' is a section"),
        ("distill: {student: {parametres: 0.5}}", "Did you mean 'distill.student.parameters'"),
        ("distill: {student: {parameters: 0.5, layers: 2}}", "one target"),
        ("distill: {rounds: 2}", "student.parameters or student.flops"),
        ("distill: {rounds: 2, student: {layers: 2}}", "student.parameters or student.flops"),
        ("distill: {rounds: 2, student: {parameters: 0.3}}", "Take rounds=3"),
        ("distill: {rounds: 0}", "rounds"),
        ("prune: {pruning: {schedule: adaptive}, one_shot: true}", "adaptive"),
        ("prune: {pruning: {end_step: 500}}", "must end before its training"),
    ],
)
def test_mistakes_name_their_remedy_on_one_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "x.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_a_packaged_recipe():
    with pytest.raises(UserError, match="Did you mean 'quick'"):
        load_recipe("quik")


@pytest.mark.parametrize("text", ["train.fit.steps", "=3", "a=[1"])
def test_malformed_overrides(text):
    with pytest.raises(UserError):
        parse_override(text)


def test_an_override_below_a_value():
    with pytest.raises(UserError, match="name is a value"):
        load_recipe(None, {"name.x": 1})


def test_a_stage_may_be_left_out(tmp_path):
    (tmp_path / "x.yaml").write_text("distill: null\nprune: false\n")
    (tmp_path / "x.toml").write_text("distill = false\nprune = false\n")  # TOML has no null
    recipe = load_recipe(tmp_path / "x.yaml")
    assert (recipe.distill, recipe.prune) == (None, None)
    assert recipe.qat == Recipe().qat
    assert load_recipe(tmp_path / "x.toml") == recipe
    again = load_recipe(tmp_path / "x.yaml", {"prune.pruning.sparsity": 0.7})
    assert again.prune.pruning.sparsity == 0.7  # asked for after all
    assert load_recipe(None, {"qat": None}).qat is None


def test_rounds_that_remove_a_third_at_most():
    from tf_gptopt.recipes.sections import check_rounds

    for fraction, rounds in [(0.67, 1), (2 / 3, 1), (0.5, 2), (4 / 9, 2), (0.3, 3), (0.2, 4)]:
        check_rounds(fraction, rounds)
    for fraction, rounds in [(0.66, 1), (0.44, 2), (0.29, 3)]:
        with pytest.raises(UserError, match=f"rounds={rounds + 1}"):
            check_rounds(fraction, rounds)
    minitron = load_recipe("minitron")
    assert minitron.distill.rounds > 1
    assert minitron.prune is None


def test_one_shot_pruning_needs_no_room_for_its_schedule():
    values = {"prune.one_shot": True, "prune.pruning.end_step": 500}
    assert load_recipe(None, values).prune.one_shot


def test_recipe_is_frozen():
    with pytest.raises(AttributeError):
        Recipe().seed = 1


def test_a_section_keeps_what_a_recipe_leaves_out(tmp_path):
    (tmp_path / "x.yaml").write_text("qat: {fit: {steps: 7}}")
    recipe, default = load_recipe(tmp_path / "x.yaml"), Recipe()
    assert recipe.qat.fit.steps == 7
    assert recipe.qat.fit.learning_rate == default.qat.fit.learning_rate == 2e-4
    assert recipe.train == default.train
