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
    assert recipe.qat.quantization is None  # that of the model it reads, so int8
    assert (recipe.quantize, recipe.export.quantization) == (None, None)  # as training saw it


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
        ("distill: {pruning: {end_step: 500}}", "must end before its training"),
        ("distill: {pruning: {end_step: 9}, quantization: int8}", "not both at once"),
        ("quantize: {quantization: int3}", "Unknown quantization recipe 'int3'"),
        ("quantize: {quantization: 4}", "'quantize.quantization' is a section"),
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


def test_a_scheme_by_name_by_file_and_changed(tmp_path):
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.recipes.recipe import read_scheme

    mixed = QuantConfig("int4", layers={"block_0_*": "int8", "token_embedding": "int4:128"})
    (tmp_path / "mixed.yaml").write_text(
        "quantization:\n  weights: int4\n"
        "  layers: {block_0_*: int8, token_embedding: int4:128}\n"
    )  # fmt: skip
    (tmp_path / "bare.yaml").write_text("weights: int4\ngranularity: 64\n")
    assert read_scheme(str(tmp_path / "mixed.yaml")) == mixed
    assert read_scheme(str(tmp_path / "bare.yaml")) == QuantConfig("int4", granularity=64)
    (tmp_path / "x.yaml").write_text(
        f"quantize: {{quantization: int4-gptq}}\nexport: {{quantization: {tmp_path}/mixed.yaml}}\n"
    )
    recipe = load_recipe(tmp_path / "x.yaml", {"quantize.quantization.granularity": 64})
    assert recipe.quantize.quantization == QuantConfig.from_recipe("int4-gptq", granularity=64)
    assert recipe.export.quantization == mixed
    names = {"qat.quantization": "int8-static", "qat.quantization.smoothing": 0.5}
    assert load_recipe(None, names).qat.quantization == QuantConfig.from_recipe(
        "int8-static", smoothing=0.5
    )
    with pytest.raises(UserError, match="Did you mean 'int4-gptq'"):
        load_recipe(None, {"export.quantization": "int4-gtpq"})
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(None, {"export.quantization": "nowhere.yaml"})


def test_the_file_takes_the_scheme_of_the_stage_before_it():
    from tf_gptopt.compression.quantization.config import QuantConfig
    from tf_gptopt.recipes.runner import export_of

    def scheme(**overrides):
        values = {key.replace("__", "."): value for key, value in overrides.items()}
        section, looks_at_text = export_of(load_recipe(None, values))
        return section.quantization, looks_at_text

    gptq, static = (QuantConfig.from_recipe(name) for name in ("int4-gptq", "int8-static"))
    assert scheme() == (QuantConfig(), False)
    assert scheme(qat=None) == (QuantConfig(), False)
    assert scheme(qat__quantization="int8-static") == (static, False)  # training leaves ranges
    assert scheme(quantize__quantization="int4-gptq") == (gptq, False)
    assert scheme(export__quantization="int4-gptq", qat=None) == (gptq, True)
    assert scheme(export__quantization="int8-static") == (static, True)
    assert scheme(quantize={}, qat__quantization="int8-static") == (static, False)
    taught = {"distill__quantization": "int4-gptq", "prune": None, "qat": None}
    assert scheme(**taught)[0] == gptq
    taught["prune"] = load_recipe().to_dict()["prune"]  # which trains, and leaves the grid
    assert scheme(**taught)[0] == QuantConfig()


def test_packaged_recipes_say_what_they_are():
    from tf_gptopt.recipes.explain import describe_runs

    lines = describe_runs()
    assert list(lines) == packaged_recipes()
    assert all(line[0].isupper() and line.endswith(".") for line in lines.values())
