"""Recipes side by side, and pruning beside training from scratch."""

import re
import statistics
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

import zoo_compress as zc
from zoo_compress.cli import cli
from zoo_compress.compare import compare, format_lines
from zoo_compress.errors import RecipeError
from zoo_compress.recipe import load_recipe
from zoo_compress.record import read_record
from zoo_compress.rethink import rethink, training_of
from zoo_compress.sharing import card
from zoo_compress.surgery.masks import masks_of

ROOT = Path(__file__).parent.parent

START = """
model:
  name: test_resnet
  args: {num_classes: 10, in_chans: 1, drop_rate: 0.1}
  pretrained_cfg: {input_size: [1, 8, 8]}
data: {source: digits, batch_size: 256}
measure: {runs: 2}
output: OUT
stages:
"""
TRAIN = "  - train: {epochs: 2, warmup_epochs: 1, lr: 3e-3}\n"
PRUNE = "  - prune: {macs: 0.5, round_to: 4}\n"
TUNE = "  - finetune: {epochs: 1, lr: 1e-3}\n"
SAVE = "  - save\n"


def silent(line):
    pass


def write(folder, *stages, name="recipe"):
    path = folder / f"{name}.yaml"
    path.write_text(START.replace("OUT", str(folder / name)) + "".join(stages))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rethink")
    path = write(folder, TRAIN, PRUNE, TUNE, SAVE)
    return folder, path, rethink([path], (0, 1), log=silent)


def test_the_baselines_have_the_pruned_structure_and_the_papers_epochs(done):
    folder, _, table = done
    assert [line.label for line in table] == ["before pruning", "after pruning", "after fine-tuning", "Scratch-E", "Scratch-B"]
    dense, _, tuned, scratch_e, scratch_b = table
    assert tuned.macs == scratch_e.macs == scratch_b.macs
    assert (scratch_e.params, scratch_b.params) == (tuned.params, tuned.params)
    for seed in (0, 1):
        output = folder / f"recipe_seed{seed}"
        stretched = round(2 * dense.macs / tuned.macs)
        for name, epochs in (("scratch_e", 2), ("scratch_b", stretched)):
            record, recipe = read_record(output / name), load_recipe(output / f"{name}.yaml")
            assert [len(step.epochs) for step in record.steps if step.epochs] == [epochs]
            assert recipe.stages[1].warmup_epochs == epochs // 2
            assert recipe.model.args == {"drop_rate": 0.1}
            assert record.recipe["seed"] == seed
            scratch, pruned = (zc.load(at) for at in (output / name / "model", output / "model"))
            shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (scratch, pruned)]
            assert shapes[0] == shapes[1]
            assert not torch.equal(scratch.fc.weight, pruned.fc.weight)
    assert stretched == 4


def test_numbers_are_those_of_the_records(done):
    folder, _, table = done
    records = [read_record(folder / f"recipe_seed{seed}") for seed in (0, 1)]
    for line in table:
        rows = [next(row for row in (*record.table, *record.baselines) if row.label == line.label) for record in records]
        assert line.top1 == tuple(row.top1 for row in rows)
        assert line.mean == pytest.approx(sum(line.top1) / 2)
        assert line.spread == pytest.approx(abs(line.top1[0] - line.top1[1]) / 2**0.5)
    text = format_lines(table)
    assert all(f"{line.mean:.2f} ± {line.spread:.2f}" in text for line in table)
    assert text.count("recipe ") == 1


def test_nothing_is_trained_twice_and_cards_show_both(done):
    folder, path, table = done
    said = []
    assert rethink([path], (0, 1), log=said.append) == table
    assert all("finished earlier" in line for line in said)
    text = (card.write(folder / "recipe_seed0", [folder / "recipe_seed1"]) / "README.md").read_text()
    assert "Not measured" not in text
    for line, row in zip(table[-2:], read_record(folder / "recipe_seed0").baselines, strict=True):
        assert f"{line.label}: top-1 {line.mean:.2f} ± {statistics.stdev(line.top1):.2f}%" in text
        # Of the structure that is above, whose time is there; this one's may be of another machine.
        assert re.search(rf"\| {line.label} \| {row.params:,} \| {row.macs:,}.* \| – \|$", text, re.MULTILINE)


def test_compare(done, tmp_path):
    _, path, table = done
    other = write(tmp_path, "  - train: {epochs: 1, lr: 3e-3}\n", name="other")
    found = compare([path, other], (0, 1), log=silent)
    assert found[:-1] == table
    assert (found[-1].recipe, found[-1].label, len(found[-1].top1)) == ("other", "model", 2)
    result = CliRunner().invoke(cli, ["compare", str(other), "--seeds", "0"])
    assert result.exit_code == 0
    assert f"{found[-1].top1[0]:.2f}" in result.output
    assert "±" not in result.output, "one seed has no spread"


def test_training_that_removes_blocks_counts_from_the_network_it_began_with(tmp_path):
    """What is saved is the smaller one, and no stage was before it: Scratch-B has the whole network's MACs to spend all the same."""
    method = "  - train: {epochs: 5, lr: 3e-3, method: {blocks: {penalty: 0.1, least: 1.0}}}\n"
    table = {line.label: line for line in rethink([write(tmp_path, method, TUNE, SAVE)], (0,), log=silent)}
    whole = zc.analyze(timm.create_model("test_resnet", num_classes=10, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 8, 8)}))
    assert table["Scratch-E"].macs == table["Scratch-B"].macs == table["after fine-tuning"].macs < whole.macs()
    output = tmp_path / "recipe_seed0"
    assert zc.load(output / "scratch_e/model").state_dict().keys() == zc.load(output / "model").state_dict().keys()
    stages = [load_recipe(output / f"scratch_{kind}.yaml").stages[1] for kind in "eb"]
    assert [stage.epochs for stage in stages] == [5, round(5 * whole.macs() / table["after fine-tuning"].macs)]
    assert [stage.method for stage in stages] == [None, None]


def test_training_that_removes_weights_is_compared_with_the_same_mask(tmp_path):
    method = "  - train: {epochs: 1, lr: 3e-3, method: {gradual: {density: 0.3, every: 1}}}\n"
    rethink([write(tmp_path, method, SAVE)], (0,), log=silent)
    pruned, scratch = (masks_of(zc.load(tmp_path / "recipe_seed0" / folder / "model")) for folder in (".", "scratch_e"))
    assert pruned.keys() == scratch.keys() != set()
    assert all(torch.equal(mask, scratch[name]) for name, mask in pruned.items())
    scratch_e, scratch_b = read_record(tmp_path / "recipe_seed0").baselines
    assert scratch_b == scratch_e.model_copy(update={"label": "Scratch-B"}), "as many epochs are as much compute"
    assert not (tmp_path / "recipe_seed0/scratch_b").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/rethink").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_can_be_rethought(path):
    assert [stage.epochs for stage in training_of(path, load_recipe(path))] == [4]


@pytest.mark.parametrize("kind", ["slim", "us"])
def test_each_width_of_a_slimmable_network_is_trained_alone(tmp_path, kind):
    method = f"  - train: {{epochs: 2, lr: 3e-3, method: {{{kind}: {{widths: [0.5, 1.0], round_to: 4}}}}}}\n"
    path = write(tmp_path, method, SAVE)
    table = {line.label: line for line in rethink([path], (0,), log=silent)}
    assert list(table) == ["model ×1", "model ×0.5", "Scratch-E ×1", "Scratch-E ×0.5"]
    output = tmp_path / "recipe_seed0"
    net = zc.load(output / "model")
    for width in (0.5, 1.0):
        alone, own = zc.load(output / f"alone_{width:g}" / "model"), net.export(width)
        assert [(name, p.shape) for name, p in alone.named_parameters()] == [(name, p.shape) for name, p in own.named_parameters()]
        assert not torch.equal(alone.conv1[0].weight, own.conv1[0].weight)
        assert table[f"Scratch-E ×{width:g}"].macs == table[f"model ×{width:g}"].macs
        record = read_record(output / f"alone_{width:g}")
        assert [len(step.epochs) for step in record.steps if step.epochs] == [2]
    text = (card.write(output) / "README.md").read_text()
    assert "Not measured" not in text
    assert f"Scratch-E ×0.5: top-1 {table['Scratch-E ×0.5'].mean:.2f}%" in text


def test_the_networks_that_end_at_the_exits_are_trained_alone(tmp_path):
    """And the whole as if it had none. Where samples leave by themselves is no structure."""
    method = "  - train: {epochs: 2, lr: 3e-3, method: {exits: {exits: 2, budget: 0.8}}}\n"
    path = write(tmp_path, method, SAVE)
    path.write_text(path.read_text().replace("batch_size: 256}", "batch_size: 256, held_out: 200}"))
    table = {line.label: line for line in rethink([path], (0,), log=silent)}
    shared = ["model", "model exit 0", "model exit 1", "model thresholds"]
    assert list(table) == [*shared, "Scratch-E", "Scratch-E exit 0", "Scratch-E exit 1"]
    output = tmp_path / "recipe_seed0"
    for label in ("exit 0", "exit 1"):
        alone = zc.load(output / f"alone_{label.replace(' ', '_')}" / "model")
        assert alone.record.truncated
        assert table[f"Scratch-E {label}"].macs == table[f"model {label}"].macs == zc.analyze(alone).macs()
    assert len(zc.load(output / "alone/model").exits) == 2
    stage = load_recipe(output / "alone.yaml").stages[1]
    assert (stage.epochs, stage.method.train) == (2, "main")
    text = (card.write(output) / "README.md").read_text()
    assert "Not measured" not in text
    assert f"trained without compressing it reaches {table['Scratch-E'].mean:.2f}%" in text
    assert f"Scratch-E exit 1: top-1 {table['Scratch-E exit 1'].mean:.2f}%" in text


def test_a_method_that_changes_no_structure_is_compared_with_training_without_it(tmp_path):
    method = "  - train: {epochs: 2, lr: 3e-3, method: {binary: {}}}\n"
    table = {line.label: line for line in rethink([write(tmp_path, method, SAVE)], (0,), log=silent)}
    assert list(table) == ["model", "Scratch-E", "Scratch-B"]
    output = tmp_path / "recipe_seed0"
    binary, scratch = (zc.load(output / folder).layer2[0].conv1.weight for folder in ("model", "scratch_e/model"))
    assert len(binary.unique()) == 2 < len(scratch.unique())
    plain = write(tmp_path, method.replace(", method: {binary: {}}", ""), SAVE, name="plain")
    assert compare([plain], (0,), log=silent)[0].macs == table["Scratch-E"].macs
    assert f"trained without compressing it reaches {table['Scratch-E'].mean:.2f}%" in (card.write(output) / "README.md").read_text()


def test_a_card_says_when_training_followed_compression(tmp_path):
    path = write(tmp_path, "  - sparsify: {density: 0.3, criterion: snip}\n", TUNE.replace("finetune", "train"), SAVE)
    compare([path], (0,), log=silent)
    text = (card.write(tmp_path / "recipe_seed0") / "README.md").read_text()
    assert "This is one: it was compressed before it was trained" in text
    assert "Not measured" not in text


@pytest.mark.parametrize(
    ("stages", "seeds", "message"),
    [
        ((TRAIN, SAVE), (0,), "expected a stage that compresses, or trains by a method, found none"),
        ((PRUNE, TUNE, SAVE), (0,), "expected a train stage before the first that compresses"),
        ((TRAIN, PRUNE, TUNE), (0,), "expected a save stage at the end, whose model has the structure to train, found finetune"),
        ((TRAIN, PRUNE, SAVE), (), "seeds: expected one or more different ones, found none"),
        ((TRAIN, PRUNE, SAVE), (1, 1), "seeds: expected one or more different ones, found 1, 1"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(tmp_path, stages, seeds, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        rethink([write(tmp_path, *stages)], seeds, log=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_recipes_train_alike_is_trained_once(tmp_path):
    """Taken over from the first, the second ends with the weights it has by itself; what trains otherwise takes nothing."""
    first = write(tmp_path, TRAIN, PRUNE, SAVE, name="first")
    second = write(tmp_path, TRAIN, "  - sparsify: {density: 0.4}\n", TUNE, SAVE, name="second")
    third = write(tmp_path, TRAIN.replace("3e-3", "2e-3"), PRUNE, SAVE, name="third")
    said = []
    together = compare([first, second, third], (0, 1), log=said.append)
    taken = [line for line in said if "begins as the run in" in line]
    assert [line.partition(" did:")[0] for line in taken] == [f"begins as the run in {tmp_path}/first_seed{seed}" for seed in (0, 1)]
    moved = [folder.rename(folder.with_name(f"was_{folder.name}")) for folder in sorted(tmp_path.glob("second_seed*"))]
    assert compare([second], (0, 1), log=silent) == [line for line in together if line.recipe == "second"]
    for before in moved:
        now = before.with_name(before.name.removeprefix("was_"))
        assert (before / "model/model.safetensors").read_bytes() == (now / "model/model.safetensors").read_bytes()
        epochs = [[epoch.train_loss for step in read_record(folder).steps for epoch in step.epochs] for folder in (before, now)]
        assert epochs[0] == epochs[1]
        assert len(epochs[0]) == 3


def test_recipes_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RecipeError, match="expected recipes with different file names, found recipe, recipe"):
        compare([write(tmp_path, TRAIN), write(tmp_path / "a", TRAIN)], (0,), log=silent)
