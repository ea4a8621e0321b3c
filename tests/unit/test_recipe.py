"""Recipes: chained stages, defaults, references, and errors with full paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from samara.config import dump_yaml, parse_yaml
from samara.errors import ConfigError
from samara.recipe import load_recipe, parse_recipe

MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
PREPARE = {"source": {"kind": "files", "paths": ["a.txt"]}}
PRETRAIN = {
    "model": MODEL,
    "data": {"corpus": "stage:data", "sequence_length": 32},
    "optimizer": {"kind": "adamw", "lr": 1e-3},
    "training": {"max_steps": 10, "batch_size": 4},
}


def chain(**changes):
    recipe = {
        "schema": 1,
        "name": "chain",
        "defaults": {"pretrain": {"seed": 3, **{k: PRETRAIN[k] for k in PRETRAIN if k != "model"}}},
        "stages": {
            "data": {"prepare": PREPARE},
            "dense": {"pretrain": {"model": MODEL}},
            "cola": {"pretrain": {"model": {**MODEL, "cola": {"rank": 16}}, "seed": 4}},
        },
    }
    return {**recipe, **changes}


def test_defaults_are_laid_under_each_stage_of_their_verb():
    recipe = parse_recipe(chain())
    folders = {"data": Path("out/data")}
    dense, cola = (stage.config(folders) for stage in recipe.stages[1:])
    assert (dense.seed, cola.seed) == (3, 4)
    assert dense.data.corpus == "out/data"
    assert dense.optimizer.lr == 1e-3
    assert recipe.stages[1].needs == ("data",)


def test_the_resolved_recipe_is_a_recipe_with_nothing_implicit():
    recipe = parse_recipe(chain())
    resolved = recipe.resolved()
    again = parse_recipe(parse_yaml(dump_yaml(resolved), origin="x"))
    assert again.resolved() == resolved
    assert again.fingerprints() == recipe.fingerprints()
    assert resolved["stages"]["dense"]["pretrain"]["model"]["num_query_heads"] == [4, 4]
    assert resolved["stages"]["dense"]["pretrain"]["data"]["corpus"] == "stage:data"


def test_a_changed_input_changes_the_fingerprint_of_what_needs_it_only():
    before = parse_recipe(chain()).fingerprints()
    changed = chain()
    changed["stages"]["dense"]["pretrain"]["seed"] = 9
    after = parse_recipe(changed).fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"dense"}
    changed["stages"]["data"]["prepare"] = {**PREPARE, "max_documents": 5}
    after = parse_recipe(changed).fingerprints()
    assert all(before[name] != after[name] for name in before)


def test_layerwise_scaling_is_saved_as_lists():
    stages = chain()["stages"]
    stages["dense"]["pretrain"]["model"] = {**MODEL, "layerwise_scaling": {}, "ffn_dim_divisor": 16}
    resolved = parse_recipe(chain(stages=stages)).resolved()
    model = resolved["stages"]["dense"]["pretrain"]["model"]
    assert model["layerwise_scaling"] is None
    assert model["num_query_heads"] == [2, 4]
    assert model["ffn_dim"] == [32, 256]


def _single(tmp_path: Path, **changes) -> Path:
    data = {**PRETRAIN, "data": {"corpus": "folder"}, **changes}
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml({"schema": 1, "name": "one", "pretrain": data}))
    return path


def test_overrides_need_no_verb_where_there_is_one(tmp_path):
    path = _single(tmp_path)
    for override in ("optimizer.lr=2e-3", "pretrain.optimizer.lr=2e-3"):
        (stage,) = load_recipe(path, [override]).stages
        assert stage.config({}).optimizer.lr == 2e-3
    assert load_recipe(path, ["name=two"]).name == "two"


def test_an_override_reaches_a_stage(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(dump_yaml(chain()))
    recipe = load_recipe(path, ["stages.cola.pretrain.optimizer.lr=5e-3"])
    assert recipe.stages[2].config({"data": Path("x")}).optimizer.lr == 5e-3


def _stages(**stages):
    return chain(stages={"data": {"prepare": PREPARE}, **stages})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "x", "prepare": PREPARE}, "schema: is required and not given"),
        ({"schema": 2, "name": "x"}, "schema: "),
        ({"schema": 1, "name": "x"}, "recipe: names no verb (known: prepare, pretrain"),
        ({"schema": 1, "name": "../x", "prepare": PREPARE}, "name: string should match"),
        (
            {"schema": 1, "name": "x", "pretrian": {}},
            "pretrian: unknown key (did you mean 'pretrain'?)",
        ),
        (
            {"schema": 1, "name": "x", "prepare": PREPARE, "pretrain": PRETRAIN},
            "recipe: names several verbs (prepare, pretrain)",
        ),
        (
            {"schema": 1, "name": "x", "prepare": PREPARE, "defaults": {"prepare": {}}},
            "defaults: needs stages",
        ),
        (
            {
                "schema": 1,
                "name": "x",
                "pretrain": {**PRETRAIN, "optimizer": {"kind": "adamw", "lr": "fast"}},
            },
            "pretrain.optimizer.lr: input should be a valid number",
        ),
        (
            {"schema": 1, "name": "x", "pretrain": PRETRAIN},
            "pretrain.data.corpus: no earlier stage is called 'data'",
        ),
        (chain(stages={}), "stages: is empty"),
        (chain(defaults={"pretrian": {}}), "defaults.pretrian: unknown verb (did you mean"),
        (chain(prepare=PREPARE), "prepare: a recipe has either stages or one verb"),
        (_stages(Big={"prepare": PREPARE}), "stages.Big: a stage's name is lower-case"),
        (_stages(x={}), "stages.x: names no verb"),
        (
            _stages(x={"pretrain": {"model": {**MODEL, "hidden": 1}}}),
            "stages.x.pretrain.model.hidden: unknown key (did you mean 'hidden_size'?)",
        ),
        (
            _stages(x={"pretrain": {"model": MODEL, "data": {"corpus": "stage:date"}}}),
            "stages.x.pretrain.data.corpus: no earlier stage is called 'date' "
            "(did you mean 'data'?)",
        ),
        (
            _stages(x={"pretrain": {"model": {**MODEL, "hidden_size": 70}}}),
            "stages.x.pretrain.model: hidden_size 70 is not divisible by head_dim 16",
        ),
        (
            _stages(
                x={"pretrain": {"model": {**MODEL, "num_query_heads": 6, "gqa_group_size": 4}}}
            ),
            "stages.x.pretrain.model: layer 0 has 6 query heads, not divisible into 4 per",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(recipe, message):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(recipe)
    assert str(caught.value).splitlines()[0].startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"batch_size": 4}},
            "pretrain.training: give one of max_steps and max_tokens",
        ),
        (
            {"training": {"max_steps": 1, "batch_size": 4, "micro_batch_size": 3}},
            "pretrain.training: batch_size 4 is not divisible by micro_batch_size 3",
        ),
        (
            {
                "training": {
                    "max_steps": 1,
                    "batch_size": 4,
                    "activation_checkpointing": "cola_m",
                }
            },
            "pretrain: training.activation_checkpointing: cola_m needs model.cola",
        ),
        ({"init_from": "folder"}, "pretrain: give one of model and init_from"),
        (
            {"data": {"corpus": "x", "sequence_length": 4096}},
            "pretrain: data.sequence_length 4096 exceeds model.max_position_embeddings 2048",
        ),
        (
            {"checkpoint": {"average_last": 5}},
            "pretrain.checkpoint: average_last > 1 needs every_steps",
        ),
        (
            {"model": {**MODEL, "num_query_heads": [4, 4, 4]}},
            "pretrain.model: num_query_heads lists 3 layers, num_hidden_layers is 2",
        ),
        (
            {"model": {**MODEL, "layerwise_scaling": {}, "ffn_dim": 64}},
            "pretrain.model: ffn_dim and layerwise_scaling both set the widths",
        ),
        ({"model": {**MODEL, "head_dim": 3}}, "pretrain.model: head_dim 3 is odd"),
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_line(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(_single(tmp_path, **changes))
    assert str(caught.value).startswith(message)


def test_a_reference_may_name_a_file_of_an_earlier_stage(tmp_path):
    """Its stage is an input, and the resolved recipe is a recipe again."""
    data = _stages(
        data={"prepare": {"source": {"kind": "interpreter_docs"}}},
        x={
            "finetune": {
                "init_from": "stage:data",
                "task": {"kind": "labels", "name": "t", "data": "stage:data/documents/test.jsonl"},
                "data": {"train": "stage:data/documents/train.jsonl"},
                "training": {"max_steps": 1},
            }
        },
    )
    recipe = parse_recipe(data)
    (stage,) = [stage for stage in recipe.stages if stage.name == "x"]
    assert stage.needs == ("data",)
    config = stage.config({"data": tmp_path})
    assert config.data.train == str(tmp_path / "documents" / "train.jsonl")
    resolved = recipe.resolved()
    assert (
        resolved["stages"]["x"]["finetune"]["data"]["train"] == "stage:data/documents/train.jsonl"
    )
    assert parse_recipe(resolved).fingerprints() == recipe.fingerprints()
