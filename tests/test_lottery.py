"""Lottery tickets on real digits: what is rewound, what remains, what the controls change, and stopping in between."""

import json
import re

import pytest
import timm
import torch
from click.testing import CliRunner

from zoo_compress.cli import cli
from zoo_compress.errors import CompressError, RecipeError
from zoo_compress.lottery import LotteryConfig, curves, format_curves, lottery, plot
from zoo_compress.surgery.masks import masks_of, remaining
from zoo_compress.surgery.weights import classifiers, layer_weights
from zoo_compress.training.snapshot import Snapshot

RECIPE = """
model:
  name: test_resnet
  args: {num_classes: 10, in_chans: 1}
  pretrained_cfg: {input_size: [1, 8, 8]}
data: {source: digits, batch_size: 256}
output: OUT
stages:
  - train: {epochs: 1, opt: sgd, lr: 0.05}
  - save
"""
SETTINGS = LotteryConfig(rounds=2, fraction=0.5, rewind=2)


def silent(line):
    pass


def write(folder, text=RECIPE):
    path = folder / "recipe.yaml"
    path.write_text(text.replace("OUT", str(folder / "out")))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lottery")
    return folder, lottery(write(folder), SETTINGS, (0, 1), log=silent)


def ticket(folder, number, seed=0):
    return timm.create_model(f"local-dir:{folder}/out_lottery_rewind2_seed{seed}/rounds/{number:02d}", pretrained=True)


def test_every_arm_of_every_round_is_there(done):
    _, studies = done
    arms = {("ticket", 0), *((arm, number) for arm in ("ticket", "reinit", "random", "signs", "finetune") for number in (1, 2))}
    for study in studies:
        assert {(point.arm, point.round) for point in study.points} == arms
        assert all(len(point.top1) >= 1 for point in study.points)


def test_half_of_what_remains_goes_a_quarter_of_the_output_layer(done):
    folder, studies = done
    output = classifiers(ticket(folder, 0))[0]
    before = layer_weights(ticket(folder, 0))
    left = {name: weight.numel() for name, weight in before.items()}
    for number in (1, 2):
        masks = masks_of(ticket(folder, number), before)
        left = {name: n - round((0.25 if name == output else 0.5) * n) for name, n in left.items()}
        assert {name: int(mask.sum()) for name, mask in masks.items()} == left
        share = remaining(masks) / sum(weight.numel() for weight in before.values())
        assert all(point.remaining == pytest.approx(share) for point in studies[0].points if point.round == number)


def test_masks_are_nested_and_keep_the_largest_trained_weights(done):
    folder, _ = done
    first, second = (masks_of(ticket(folder, number), layer_weights(ticket(folder, 0))) for number in (1, 2))
    for name, weight in layer_weights(ticket(folder, 0)).items():
        assert not (second[name] & ~first[name]).any()
        assert weight[first[name]].abs().min() >= weight[~first[name]].abs().max()


def test_a_ticket_is_the_rewound_network_trained_again(done, tmp_path):
    """With nothing removed, a ticket repeats the first training to the bit: weights, optimizer, schedule and images are the step's."""
    again = lottery(write(tmp_path), LotteryConfig(rounds=1, fraction=1e-9, rewind=2, controls=()), log=silent)[0]
    whole, repeated = (point.top1 for point in again.points)
    assert repeated == whole
    first, second = (ticket(tmp_path, number).state_dict() for number in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_snapshot_is_of_the_asked_step_and_arms_start_where_they_should(done):
    folder, _ = done
    snapshot = Snapshot.load(folder / "out_lottery_rewind2_seed0/snapshot.safetensors")
    assert snapshot.step == 2
    trained = ticket(folder, 0).state_dict()
    assert not torch.equal(snapshot.model["conv1.0.weight"], trained["conv1.0.weight"])


def test_a_study_goes_on_and_ends_with_the_same_numbers(done, tmp_path):
    _, studies = done
    path, lines = write(tmp_path), []

    def stop(line):
        lines.append(line)
        if len(lines) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lottery(path, SETTINGS, (0,), log=stop)
    stopped = json.loads((tmp_path / "out_lottery_rewind2_seed0/lottery.json").read_text())["points"]
    assert 1 < len(stopped) < 11
    study = lottery(path, SETTINGS, (0,), log=silent)[0]
    numbers = [[(p.round, p.arm, p.remaining, p.top1) for p in each.points] for each in (study, studies[0])]
    assert numbers[0] == numbers[1]
    said = []
    assert lottery(path, SETTINGS, (0,), log=said.append)[0] == study
    assert said == [], "a finished study trains nothing"
    with pytest.raises(RecipeError, match=r"expected the recipe and settings of the study in .*, found others"):
        lottery(path, LotteryConfig(rounds=3, rewind=2), (0,), log=silent)


def test_studies_of_other_steps_to_rewind_to_stand_side_by_side(tmp_path):
    path, arms = write(tmp_path), {"rounds": 1, "controls": ()}
    for step in (0, 2):
        lottery(path, LotteryConfig(rewind=step, **arms), log=silent)
    found = {folder.name: Snapshot.load(folder / "snapshot.safetensors").step for folder in tmp_path.iterdir() if folder.is_dir()}
    assert found == {"out_lottery_seed0": 0, "out_lottery_rewind2_seed0": 2}


def test_table_and_plot(done, tmp_path):
    _, studies = done
    table = curves(studies)
    ticket_curve = table[0]
    assert ticket_curve.arm == "ticket"
    for i, number in enumerate((0, 1, 2)):
        top1 = [next(p.top1[-1] for p in study.points if (p.round, p.arm) == (number, "ticket")) for study in studies]
        assert ticket_curve.mean[i] == pytest.approx(sum(top1) / 2)
        assert ticket_curve.spread[i] == pytest.approx(abs(top1[0] - top1[1]) / 2**0.5)
    text = format_curves(table)
    assert re.match(r"weights left +ticket +reinit +random +signs +finetune", text)
    assert f"{ticket_curve.mean[2]:.2f} ± {ticket_curve.spread[2]:.2f}" in text.splitlines()[3]
    pytest.importorskip("matplotlib", reason="the extra `plots`")
    plot(table, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_command(done):
    folder, studies = done
    settings = ["--rounds", "2", "--fraction", "0.5", "--rewind", "2"]
    result = CliRunner().invoke(cli, ["lottery", str(folder / "recipe.yaml"), *settings, "--seeds", "0", "--seeds", "1"])
    assert result.exit_code == 0
    assert format_curves(curves(studies)) in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("- save", "- prune: {keep: 0.5}"), "expected one train stage without a method"),
        (("lr: 0.05", "lr: 0.05, method: {slim: {}}"), "expected one train stage without a method"),
    ],
)
def test_other_recipes_are_refused(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        lottery(write(tmp_path, RECIPE.replace(*change)), log=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_step_that_training_does_not_have(tmp_path):
    with pytest.raises(CompressError, match="snapshot: expected a step below the 5 of this training, found 50"):
        lottery(write(tmp_path), LotteryConfig(rewind=50), log=silent)


@pytest.mark.parametrize(
    ("key", "value"), [("fraction", 1.0), ("rounds", 0), ("rewind", -1), ("scope", "both"), ("controls", ("reinitt",))]
)
def test_bad_settings(key, value):
    with pytest.raises(CompressError, match=f"^LotteryConfig: {key}"):
        LotteryConfig(**{key: value})
