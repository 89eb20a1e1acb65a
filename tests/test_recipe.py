"""Recipes: the shipped ones are sound, and what is wrong with one is said in a line."""

import itertools
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo_compress.errors import RecipeError
from zoo_compress.methods.exits import ExitsConfig
from zoo_compress.methods.gradual import GradualConfig
from zoo_compress.methods.netaug import NetAugConfig
from zoo_compress.methods.slim import SlimConfig
from zoo_compress.plan import PruneRound, budget_of_round, make_plan, milestones, uncompressed
from zoo_compress.recipe import PruneStage, load_recipe
from zoo_compress.sharing.recipe_text import recipe_of, to_yaml

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))

GOOD = """
model: {name: test_resnet, args: {num_classes: 10, in_chans: 1}}
data: {source: digits}
output: out
stages:
  - train: {epochs: 2, lr: 1e-3}
  - prune: {macs: 0.5, rounds: 3, finetune: {epochs: 1, lr: 1e-3}}
  - finetune: {epochs: 1, lr: 1e-3, distill: {temperature: 2}}
  - evaluate
  - save:
"""


def load(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_scripts(path):
    recipe = load_recipe(path)
    assert path.read_text().startswith("#!/usr/bin/env -S zoo-compress run\n")
    assert os.access(path, os.X_OK)
    assert recipe.description
    assert recipe.output == f"runs/{path.stem}"


def test_both_recipes_are_shipped():
    assert {"quickstart", "test_byobnet_fmnist_half"} <= {path.stem for path in SHIPPED}


def test_a_good_recipe(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert [stage.kind for stage in recipe.stages] == ["train", "prune", "finetune", "evaluate", "save"]
    assert recipe.stages[0].lr == 1e-3, "YAML 1.2's way to write a number"
    assert recipe.stages[4].to == "model"


def test_lists_and_methods_in_stages(tmp_path):
    text = GOOD.replace("macs: 0.5,", "macs: 0.5, exclude: ['layer4.*', fc.weight],")
    recipe = load(tmp_path, text.replace("epochs: 2,", "epochs: 2, method: {slim: {widths: [0.5, 1.0]}},", 1))
    assert recipe.stages[1].exclude == ("layer4.*", "fc.weight")
    assert recipe.stages[0].method == SlimConfig(widths=(0.5, 1.0))
    assert load(tmp_path, GOOD.replace("epochs: 2,", "epochs: 2, method: {netaug: },", 1)).stages[0].method == NetAugConfig()


def test_weights_in_stages(tmp_path):
    text = GOOD.replace(
        "  - evaluate",
        "  - sparsify: {density: 0.1, criterion: snip, exclude: [fc.weight]}\n  - cluster: {bits: {'*': 3}}\n  - evaluate",
        1,
    )
    recipe = load(tmp_path, text.replace("epochs: 2,", "epochs: 2, method: {gradual: {density: 0.2}},", 1))
    assert recipe.stages[0].method == GradualConfig(density=0.2)
    sparse, clustered = (next(stage for stage in recipe.stages if stage.kind == kind) for kind in ("sparsify", "cluster"))
    assert (sparse.criterion, sparse.exclude, clustered.bits) == ("snip", ("fc.weight",), {"*": 3})
    assert load(tmp_path, to_yaml(recipe)) == recipe


EXITS = "epochs: 2, method: {exits: {exits: [0.3, 0.6], weights: msdnet, budget: 0.5, confidence: margin}},"


def test_several_methods_and_what_they_need(tmp_path):
    text = GOOD.replace("epochs: 2,", "epochs: 2, method: [{exits: {exits: 2, weights: [1, 1, 0.3]}}, {slim: {widths: [0.5, 1.0]}}],", 1)
    recipe = load(tmp_path, text)
    assert recipe.stages[0].method == (ExitsConfig(exits=2, weights=(1.0, 1.0, 0.3)), SlimConfig(widths=(0.5, 1.0)))
    assert recipe_of(recipe.model_dump(mode="json")) == recipe
    assert load(tmp_path, to_yaml(recipe)) == recipe
    held = load(tmp_path, GOOD.replace("epochs: 2,", EXITS, 1).replace("source: digits", "source: digits, held_out: 100"))
    assert held.stages[0].method.exits == (0.3, 0.6)
    assert recipe_of(held.model_dump(mode="json")) == held


def test_teachers_and_stages_that_factorise(tmp_path):
    text = GOOD.replace("distill: {temperature: 2}", "distill: {teacher: [resnet18, 'local-dir:a'], task_loss_weight: 0.0, temperature: 2}")
    text = text.replace("  - evaluate\n", "  - factorize: {macs: 0.7, data: true, exclude: [layer1.*]}\n  - separate\n  - evaluate\n", 1)
    recipe = load(tmp_path, text)
    assert recipe.stages[2].distill.teachers == ("resnet18", "local-dir:a")
    assert [stage.kind for stage in recipe.stages[3:5]] == ["factorize", "separate"]
    assert recipe.stages[3].exclude == ("layer1.*",)
    assert recipe_of(recipe.model_dump(mode="json")) == recipe
    assert load(tmp_path, to_yaml(recipe)) == recipe


def test_holding_nothing_out_is_no_change(tmp_path):
    said = load(tmp_path, GOOD.replace("source: digits", "source: digits, held_out: 0"))
    assert said.sha256 == load(tmp_path, GOOD).sha256
    assert load(tmp_path, GOOD.replace("source: digits", "source: digits, held_out: 9")).sha256 != said.sha256


def test_arguments_of_optimizers_and_augmentation_that_exist(tmp_path):
    recipe = load(tmp_path, GOOD.replace("epochs: 2,", "epochs: 2, opt_args: {betas: [0.8, 0.99], eps: 1e-6},"))
    assert recipe.stages[0].optimizer_args == {"betas": (0.8, 0.99), "eps": 1e-6}
    recipe = load(tmp_path, GOOD.replace("source: digits", "source: digits, augment: {auto_augment: rand-m9-mstd0.5}"))
    assert recipe.data.augment.auto_augment == "rand-m9-mstd0.5"


def test_another_seed_has_a_folder_of_its_own(tmp_path):
    recipe = load(tmp_path, GOOD)
    other = recipe.with_seed(7)
    assert (other.seed, other.output) == (7, f"{recipe.output}_seed7")
    assert other.sha256 != recipe.sha256
    with pytest.raises(RecipeError, match="seed: expected an integer"):
        recipe.with_seed(-1)


BAD = {
    "density": ("  - evaluate", "  - sparsify: {density: 1.5}", "sparsify.density: expected less than 1, found 1.5"),
    "no density": ("  - evaluate", "  - sparsify", "sparsify: density: expected the fraction of weights to keep"),
    "density and pattern": ("  - evaluate", "  - sparsify: {density: 0.5, pattern: '2:4'}", "density: expected none beside pattern '2:4'"),
    "pattern": ("  - evaluate", "  - sparsify: {density: 0.5, pattern: rows}", "pattern: expected kernel, channel or N:M"),
    "criterion of weights": ("  - evaluate", "  - sparsify: {density: 0.5, criterion: l2}", "criterion: expected one of magnitude"),
    "bits": (
        "  - evaluate",
        "  - cluster: {bits: 9}",
        "cluster.bits: bits: expected 1 to 8, or a pattern of parameter names for each, found 9",
    ),
    "when to remove": ("epochs: 2,", "epochs: 2, method: {gradual: {density: 0.1, start: 0.8}},", "expected start below end"),
    "binary settings": ("epochs: 2,", "epochs: 2, method: {binary: {bits: 1}},", "binary.bits: expected no such key"),
    "unknown method": ("epochs: 2,", "epochs: 2, method: {thin: {}},", "method: expected one of slim, us, netaug"),
    "methods in the wrong order": ("epochs: 2,", "epochs: 2, method: [{slim: {}}, {exits: {}}],", "method: expected slim last"),
    "no method": ("epochs: 2,", "epochs: 2, method: [],", "train.method: expected"),
    "unknown key of one of several": (
        "epochs: 2,",
        "epochs: 2, method: [{exits: {q: 3}}, {us: {}}],",
        "method.0.exits.q: expected no such",
    ),
    "no weights": ("epochs: 2,", "epochs: 2, method: {exits: {weights: [0, 0]}},", "exits.weights: expected numbers from 0 on, not all 0"),
    "no places": ("epochs: 2,", "epochs: 2, method: {exits: {exits: 0}},", "exits.exits: expected 1 to 256 of them, found 0"),
    "nothing held out": ("epochs: 2,", EXITS, "expected data.held_out, a number of training images, for thresholds"),
    "two methods": ("epochs: 2,", "epochs: 2, method: {slim: {}, us: {}},", "method: expected one of slim, us, netaug"),
    "unknown key of a method": ("epochs: 2,", "epochs: 2, method: {netaug: {q: 3}},", "netaug.q: expected no such key"),
    "r below 1": ("epochs: 2,", "epochs: 2, method: {netaug: {r: 0.5}},", "netaug.r: expected greater than or equal to 1, found 0.5"),
    "unknown key": ("data: {source: digits}", "data: {source: digits, batchsize: 3}", "data.batchsize: expected no such key"),
    "unknown key in a stage": ("epochs: 2", "epochs: 2, epoch: 3", "stages.0.train.epoch: expected no such key"),
    "wrong type": ("epochs: 2", "epochs: two", "stages.0.train.epochs: expected a valid integer, found 'two'"),
    "text for a number": ("epochs: 2", "epochs: '2'", "stages.0.train.epochs: expected a valid integer, found '2'"),
    "true for a number": ("epochs: 2", "epochs: true", "stages.0.train.epochs: expected a valid integer, found True"),
    "a fraction of an epoch": ("epochs: 2", "epochs: 2.5", "stages.0.train.epochs: expected a valid integer"),
    "impossible value": ("macs: 0.5", "macs: -1", "stages.1.prune.macs: expected greater than 0, found -1"),
    "not a number": ("macs: 0.5", "macs: .nan", "stages.1.prune.macs: expected a finite number"),
    "two budgets": ("macs: 0.5", "macs: 0.5, keep: 0.5", "prune: expected exactly one of keep, macs, params, latency, found keep and macs"),
    "no budget": ("macs: 0.5, ", "", "stages.1.prune: expected exactly one of keep, macs, params, latency, found none"),
    "milliseconds in rounds": ("macs: 0.5", "latency: 20", "stages.1.prune: expected a latency as a fraction beside several rounds"),
    "a multiple that is none": ("macs: 0.5", "macs: 0.5, round_to: automatic", "stages.1.prune.round_to"),
    "rounds without training": (", finetune: {epochs: 1, lr: 1e-3}}", "}", "stages.1.prune: expected finetune settings"),
    "unknown criterion": ("rounds: 3", "criterion: l3, rounds: 3", "stages.1.prune.criterion: expected one of"),
    "zero rounds": ("rounds: 3", "rounds: 0", "stages.1.prune.rounds"),
    "unknown model": ("name: test_resnet", "name: test_resnot", "model.name: expected a name of timm.list_models()"),
    "path for a model": ("name: test_resnet", "name: a/b", "model.name: expected a name of timm.list_models()"),
    "two budgets of ranks": (
        "- evaluate",
        "- factorize: {macs: 0.5, energy: 0.9}",
        "stages.3.factorize: expected exactly one of macs, params, energy",
    ),
    "several teachers of features": (
        "distill: {temperature: 2}",
        "distill: {teacher: [a, b], match: features}",
        "stages.2.finetune.distill: expected one teacher beside match: features, found 2",
    ),
    "features beside a method": (
        "distill: {temperature: 2}",
        "method: {slim: {}}, distill: {match: features}",
        "stages.2.finetune: distill.match: expected logits beside a method of training, found features",
    ),
    "a token beside a method": ("distill: {", "method: {slim: {}}, distill: {match: token, ", "expected logits beside a method"),
    "a penalty below zero": ("epochs: 2,", "epochs: 2, method: {slimming: {penalty: -1.0}},", "penalty: expected"),
    "unknown stage": ("- evaluate", "- evaluat", "stages.3: expected one of train, prune, finetune, evaluate, save"),
    "two stages in one": ("- evaluate", "- {evaluate: , save: }", "stages.3: expected one of train"),
    "stage settings that are no mapping": ("- evaluate", "- evaluate: 3", "stages.3: expected one of train"),
    "unknown optimizer": ("epochs: 2", "opt: adamm, epochs: 2", "stages.0.train.opt: expected one of timm.optim.list_optimizers()"),
    "unknown schedule": ("epochs: 2", "sched: cosin, epochs: 2", "stages.0.train.sched: expected 'cosine'"),
    "warm-up without end": ("epochs: 2", "warmup_epochs: 2, epochs: 2", "stages.0.train: expected warmup_epochs below epochs (2), found 2"),
    "a decay without length": (
        "epochs: 2",
        "sched: rsqrt, epochs: 2",
        "stages.0.train: expected warmup_epochs above 0 beside sched: rsqrt, which decays by their length, found 0",
    ),
    "teacher before pruning": (
        "- train: {",
        "- finetune: {distill: {}, ",
        "before stages.0.finetune.distill, whose teacher is the model before it, or a teacher, found neither",
    ),
    "missing part": ("output: out", "", "output: expected a value, found none"),
    "key given twice": ("output: out", "output: out\noutput: there", "line 5: found the key 'output' twice"),
    "key that is no text": ("output: out", "output: out\n3: there", "line 5: expected a key that is text, found 3"),
    "not YAML": ("output: out", "output: [", "line 6: expected the node content"),
    "a date": ("output: out", "output: 2020-02-02", "expected only mappings, lists, text"),
    "a Python object": ("output: out", "output: !!python/object:os.system {}", "could not determine a constructor"),
    "a loop": ("data: {source: digits}", "data: &d {source: *d}", "expected"),
    "saving outside": ("- save:", "- save: {to: ../elsewhere}", "stages.4.save.to: expected a folder below the output folder"),
    "saving over the steps": ("- save:", "- save: {to: steps/x}", "stages.4.save.to: expected a folder below the output folder"),
    "saving twice in one place": ("- save:", "- save\n  - save", "expected a folder of its own for each save stage"),
    "channels": (
        "name: test_resnet,",
        "name: test_resnet, pretrained_cfg: {input_size: [1, 8, 8], mean: [1, 2]},",
        "one mean for each of 1",
    ),
    "an image of 10**12 pixels": (
        "name: test_resnet,",
        "name: test_resnet, pretrained_cfg: {input_size: [1, 1000000, 1000000]},",
        "input_size.1: expected less than or equal to 16384, found 1000000 (and 1 more)",
    ),
    "a batch nobody has memory for": (
        "output: out",
        "output: out\nmeasure: {batch_size: 10000000000}",
        "expected less than or equal to 65536",
    ),
    "threads": ("output: out", "output: out\nmeasure: {threads: 100000}", "measure.threads: expected less than or equal to 1024"),
    "output": ("output: out", 'output: "a\\0b"', "output: "),
    "optimizer's argument": ("epochs: 2,", "epochs: 2, opt_args: {betas: x},", "train: expected opt_args that adamw takes"),
    "optimizer's argument that is a setting": ("epochs: 2,", "epochs: 2, opt_args: {lr: 5},", "train: expected opt_args that adamw takes"),
    "augmentation": ("source: digits", "source: digits, augment: {auto_augment: zz}", "auto_augment: expected a policy of timm, such as"),
    "aliases of aliases": (
        "output: out",
        "output: out\ndescription:\n" + "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 20)}]\n" for i in range(12)),
        "expected at most 100000 values, found more",
    ),
    "no stages": (GOOD[GOOD.index("stages") :], "stages: []", "stages: expected"),
    "nothing": (GOOD, "", "expected a mapping"),
}


@pytest.mark.parametrize(("old", "new", "words"), BAD.values(), ids=BAD.keys())
def test_bad_recipes_are_refused_in_one_line(tmp_path, old, new, words):
    assert old in GOOD
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GOOD.replace(old, new))
    message = str(error.value)
    assert message.startswith(str(tmp_path / "recipe.yaml"))
    assert words in message
    assert "\n" not in message


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output: \xe9")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_layers_can_be_excluded(tmp_path):
    recipe = load(tmp_path, GOOD.replace("macs: 0.5,", "macs: 0.5, exclude: [fc, layer1],"))
    assert recipe.stages[1].exclude == ("fc", "layer1")
    with pytest.raises(RecipeError, match="exclude"):
        load(tmp_path, GOOD.replace("macs: 0.5,", "macs: 0.5, exclude: [3],"))


def test_hash_is_of_what_decides_the_numbers(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert load(tmp_path, "# a remark\n" + GOOD.replace("output: out", "output: there\ndescription: words")).sha256 == recipe.sha256
    assert load(tmp_path, GOOD + "seed: 1\n").sha256 != recipe.sha256
    assert load(tmp_path, GOOD.replace("lr: 1e-3", "lr: 0.001")).sha256 == recipe.sha256
    assert re.fullmatch("[0-9a-f]{64}", recipe.sha256)


def test_plan_writes_rounds_out(tmp_path):
    plan = make_plan(load(tmp_path, GOOD))
    kinds = ["create", "train", *["prune", "finetune"] * 3, "evaluate", "save", "report"]
    assert [step.kind for step in plan] == kinds
    assert [step.name for step in plan] == [f"{index:02d}_{kind}" for index, kind in enumerate(kinds)]
    assert {label: step.name for label, step in milestones(plan).items()} == {
        "before pruning": "01_train",
        "after pruning": "06_prune",
        "after fine-tuning": "07_finetune",
    }
    assert uncompressed(plan) is plan[1]
    assert {step.action.first for step in plan if isinstance(step.action, PruneRound)} == {"02_prune"}


def test_plan_without_pruning(tmp_path):
    text = GOOD[: GOOD.index("  - prune")]
    plan = make_plan(load(tmp_path, text))
    assert uncompressed(plan) is None
    assert [step.name for step in milestones(plan).values()] == ["01_train"]


BLOCKS = "  - {}: {{epochs: 1, lr: 1e-3, method: {{blocks: {{}}}}}}\n"
LEARN = "  - finetune: {epochs: 1, lr: 1e-3, distill: {}}\n"


@pytest.mark.parametrize(
    ("stages", "rows"),
    [
        # Trained before a method compresses: there is a model to compare with, and to learn from.
        (
            "  - train: {epochs: 1, lr: 1e-3}\n" + BLOCKS.format("train") + LEARN,
            {"before training with blocks": "01_train", "after training with blocks": "02_train", "after fine-tuning": "03_finetune"},
        ),
        (
            "  - train: {epochs: 1, lr: 1e-3}\n" + BLOCKS.format("finetune") + "  - prune: {macs: 0.5}\n" + LEARN,
            {
                "before fine-tuning with blocks": "01_train",
                "after fine-tuning with blocks": "02_finetune",
                "after pruning": "03_prune",
                "after fine-tuning": "04_finetune",
            },
        ),
        # Compressed by the first training: nothing was there before.
        (
            BLOCKS.format("train") + "  - finetune: {epochs: 1, lr: 1e-3}\n",
            {"after training with blocks": "01_train", "after fine-tuning": "02_finetune"},
        ),
        (
            BLOCKS.format("train") + "  - prune: {macs: 0.5}\n" + LEARN,
            {"before pruning": "01_train", "after pruning": "02_prune", "after fine-tuning": "03_finetune"},
        ),
        (BLOCKS.format("train"), {"model": "01_train"}),
    ],
)
def test_training_that_compresses_is_a_stage_that_does(tmp_path, stages, rows):
    plan = make_plan(load(tmp_path, GOOD[: GOOD.index("  - train")] + stages))
    found = milestones(plan)
    assert {label: step.name for label, step in found.items()} == rows
    dense = uncompressed(plan)
    assert (dense and dense.name) == next((name for label, name in rows.items() if label.startswith("before")), None)


def test_what_the_first_training_compresses_has_no_teacher(tmp_path):
    with pytest.raises(RecipeError, match="or a teacher, found neither"):
        load(tmp_path, GOOD[: GOOD.index("  - train")] + BLOCKS.format("train") + LEARN)


@given(st.floats(0.05, 0.95), st.integers(2, 12), st.sampled_from(["macs", "params"]))
def test_rounds_are_geometric_and_end_at_the_budget(limit, rounds, name):
    stage = PruneStage.model_validate({"kind": "prune", name: limit, "rounds": rounds, "finetune": {"epochs": 1, "lr": 0.1}})
    sizes = [1e6] + [budget_of_round(PruneRound(stage, number, "x"), 1e6)[name] for number in range(1, rounds + 1)]
    ratios = [after / before for before, after in itertools.pairwise(sizes)]
    assert ratios == pytest.approx([ratios[0]] * rounds)
    assert sizes[-1] == pytest.approx(limit * 1e6)
    for share in ("keep", "latency"):
        whole = PruneStage.model_validate({"kind": "prune", share: limit, "rounds": rounds, "finetune": {"epochs": 1, "lr": 0.1}})
        assert math.prod(budget_of_round(PruneRound(whole, n, "x"), 1)[share] for n in range(rounds)) == pytest.approx(limit)


@given(st.floats(0.05, 0.9))
def test_auto_rounds_remove_about_a_tenth_each(limit):
    stage = PruneStage.model_validate({"kind": "prune", "macs": limit, "rounds": "auto", "finetune": {"epochs": 1, "lr": 0.1}})
    assert 0.05 < 1 - limit ** (1 / stage.num_rounds) < 0.15


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_survives_its_record_and_its_card(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe_of(recipe.model_dump(mode="json")) == recipe
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
