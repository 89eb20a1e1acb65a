"""Runs: whole, stopped, killed, repeated, shared between processes. The numbers must not tell which."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

import zoo_compress as zc
from zoo_compress import actions
from zoo_compress.actions import create
from zoo_compress.errors import CompressError, RecipeError
from zoo_compress.recipe import load_recipe
from zoo_compress.runner import run
from zoo_compress.training.checkpoint import load_state
from zoo_compress.training.config import DataConfig
from zoo_compress.training.data import eval_loader
from zoo_compress.training.loop import evaluate, fit
from zoo_compress.training.sources import open_source

START = """
model:
  name: test_resnet
  args: {{num_classes: 10, in_chans: 1}}
  pretrained_cfg: {{input_size: [1, 8, 8]}}
data: {{source: digits, batch_size: 256}}
output: {output}
stages:
"""
RECIPE = (
    START
    + """
  - train: {{epochs: 2, lr: 3e-3, ema_decay: 0.9}}
  - prune: {{macs: 0.6, round_to: 4, rounds: 2, reconstruct: true, finetune: {{epochs: 1, lr: 1e-3}}}}
  - finetune: {{epochs: 2, lr: 1e-3, distill: {{}}}}
  - evaluate
  - save
measure: {{runs: 3}}
"""
)


def write(folder, output="out", text=RECIPE):
    path = folder / "recipe.yaml"
    path.write_text(text.format(output=folder / output))
    return path


def numbers(output):
    """All of a record that does not depend on the clock."""
    record = json.loads((output / "results.json").read_text())
    steps = [(s["name"], s["metrics"], [{k: v for k, v in e.items() if k != "seconds"} for e in s["epochs"]]) for s in record["steps"]]
    table = [{k: v for k, v in row.items() if not k.startswith("latency")} for row in record["table"]]
    return record["status"], steps, table


def weights(output):
    return (output / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record = run(write(folder), log=lambda line: None)
    torch.set_num_threads(threads)
    return folder, record


def start(recipe, *launcher):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "zoo_compress", "run", str(recipe)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_record_and_table(whole):
    folder, record = whole
    assert record.status == "finished"
    assert record.seed == 0
    rows = {row.label: row for row in record.table}
    assert list(rows) == ["before pruning", "after pruning", "after fine-tuning", "reloaded"]
    dense, small = rows["before pruning"], rows["after fine-tuning"]
    assert small.macs / dense.macs == pytest.approx(0.6, abs=0.02)
    assert small.params < dense.params
    assert rows["reloaded"].top1 == small.top1
    assert json.loads((folder / "out/results.json").read_text())["table"] == [row.model_dump() for row in record.table]
    assert {step.name for step in record.steps if step.epochs} == {"01_train", "03_finetune", "05_finetune"}


def test_a_stage_that_changes_the_model(tmp_path):
    """The structure of the pruned model, trained from scratch, beside it; one row a stage."""
    stages = """
  - train: {{epochs: 1, lr: 3e-3}}
  - prune: {{macs: 0.6, round_to: 4}}
  - finetune: {{epochs: 1, lr: 1e-3}}
  - reinitialize
  - finetune: {{epochs: 1, lr: 3e-3, distill: {{}}}}
  - save
measure: {{runs: 3}}
"""
    record = run(write(tmp_path, text=START + stages), log=lambda line: None)
    rows = {row.label: row for row in record.table}
    names = ["before pruning", "after pruning", "after fine-tuning", "after re-initialising", "after fine-tuning (2)", "reloaded"]
    assert list(rows) == names
    assert len({row.macs for row in record.table[1:]}) == 1
    started_over, tuned = (zc.load(tmp_path / "out/steps" / name) for name in ("04_reinitialize", "03_finetune"))
    assert (started_over.bn1.running_mean == 0).all()
    assert not (tuned.bn1.running_mean == 0).any()
    assert record.step("04_reinitialize").metrics["before"] == record.step("04_reinitialize").metrics["after"]


def test_sparse_and_clustered_stages_keep_what_they_made(tmp_path):
    stages = """
  - sparsify: {{density: 0.3, criterion: snip, calibration_batches: 1}}
  - train: {{epochs: 1, lr: 3e-3, ema_decay: 0.9}}
  - cluster: {{bits: {{"fc.*": 5, "*": 2}}}}
  - finetune: {{epochs: 1, lr: 1e-3, weight_decay: 0.1, distill: {{}}}}
  - save
measure: {{runs: 3}}
"""
    record = run(write(tmp_path, text=START + stages), log=lambda line: None)
    sizes = {row.label: row.file_bytes for row in record.table}
    assert list(sizes) == [
        "before sparsifying",
        "after sparsifying",
        "after training",
        "after clustering",
        "after fine-tuning",
        "reloaded",
    ]
    assert 0.4 * sizes["before sparsifying"] > sizes["after sparsifying"] > 3 * sizes["after clustering"]
    assert sizes["reloaded"] == (tmp_path / "out/model/model.safetensors").stat().st_size == sizes["after fine-tuning"]
    first, last = (zc.load(tmp_path / "out/steps" / name) for name in ("01_sparsify", "04_finetune"))
    assert last.pretrained_cfg["architecture"] == "test_resnet__clustered"
    for (name, before), after in zip(first.named_parameters(), last.parameters(), strict=True):
        if name.endswith("conv1.weight"):
            assert torch.equal(before == 0, after == 0)
            assert len(after.unique()) <= 5


def test_result_loads_as_any_timm_model(whole):
    folder, record = whole
    model = timm.create_model(f"local-dir:{folder / 'out/model'}", pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == record.table[-1].params
    assert model.pretrained_cfg["input_size"] == (1, 8, 8)
    assert tuple(model.pretrained_cfg["mean"]) == (0.305,)


def test_only_needed_models_stay(whole):
    folder = whole[0] / "out"
    assert {path.name for path in (folder / "steps").iterdir()} == {"01_train", "04_prune", "05_finetune"}
    assert not [path.name for path in folder.rglob("*") if "tmp" in path.name or ".old" in path.name]


def test_nothing_is_pickled(whole):
    files = {path.relative_to(whole[0] / "out") for path in (whole[0] / "out").rglob("*") if path.is_file()}
    assert {path.suffix for path in files} <= {".json", ".safetensors", ""}
    assert {str(path) for path in files if len(path.parts) == 1} == {".lock", "results.json"}


def test_a_finished_run_is_not_run_again(whole):
    folder, record = whole
    before = (folder / "out/results.json").read_bytes()
    again = []
    assert run(folder / "recipe.yaml", log=again.append) == record
    assert len(again) == 1
    assert "finished earlier" in again[0]
    assert (folder / "out/results.json").read_bytes() == before


def test_a_changed_recipe_is_refused(whole, tmp_path):
    changed = tmp_path / "recipe.yaml"
    changed.write_text((whole[0] / "recipe.yaml").read_text() + "seed: 1\n")
    with pytest.raises(RecipeError, match="found a changed one; use --fresh to start over, or another output"):
        run(changed)


def test_a_record_from_before_an_option_existed_is_of_the_same_recipe(whole, tmp_path):
    path, output = whole[0] / "recipe.yaml", whole[0] / "out"
    content = json.loads((output / "results.json").read_text())
    del content["recipe"]["stages"][0]["clip_grad"]
    before = (output / "results.json").read_bytes()
    (output / "results.json").write_text(json.dumps({**content, "recipe_sha256": "0" * 64}))
    said = []
    run(path, log=said.append)
    (output / "results.json").write_bytes(before)
    assert "finished earlier" in said[0]


def test_killed_runs_end_with_the_same_numbers(whole, tmp_path):
    recipe, output = write(tmp_path), tmp_path / "out"

    def saved_epochs():
        """The phase whose state was saved last, and its number of epochs."""
        state = output / "training.safetensors"
        state = load_state(state) if state.exists() else {"phase": {"name": ""}, "history": []}
        return state["phase"]["name"], len(state["history"])

    process = start(recipe)
    deadline = time.monotonic() + 120
    while process.poll() is None and saved_epochs() != ("finetune", 1) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    process = start(recipe)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "going on after 04_prune" in stderr
    assert "finetune 2/2:" in stderr
    assert "finetune 1/2:" not in stderr
    assert numbers(output) == numbers(whole[0] / "out")
    assert weights(output) == weights(whole[0] / "out")


def test_interrupted_between_steps_and_within_epochs(whole, tmp_path):
    recipe = write(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for word in ("prune round 2/2", "finetune 2/2"):

        def stop(line, word=word):
            if word in line:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(recipe, log=stop)
    run(recipe, log=lambda line: None)
    torch.set_num_threads(threads)
    assert numbers(tmp_path / "out") == numbers(whole[0] / "out")
    assert weights(tmp_path / "out") == weights(whole[0] / "out")


SHORT = """
model: {{name: test_resnet, args: {{num_classes: 10, in_chans: 1}}, pretrained_cfg: {{input_size: [1, 8, 8]}}}}
data: {{source: digits, batch_size: 256}}
output: {output}
stages: [train: {{epochs: 1, lr: 1e-3}}, prune: {{macs: 0.6, round_to: 4, criterion: taylor}}, save]
measure: {{runs: 2}}
"""


def test_two_processes(tmp_path):
    process = start(write(tmp_path, text=SHORT), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["status"] == "finished"
    assert record["world_size"] == 2
    assert stdout.count("before pruning") == 1
    assert stderr.count("train 1/1:") == 1
    assert [row["label"] for row in record["table"]] == ["before pruning", "after pruning", "reloaded"]
    assert record["table"][0]["top1"] == record["steps"][1]["metrics"]["top1"]


def test_fresh_starts_over_and_leaves_other_files(tmp_path):
    recipe = write(tmp_path, text=SHORT)

    def stop(line):
        if "[3/5] prune" in line:
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, log=stop)
    lines = []
    run(recipe, fresh=True, log=lines.append)
    assert any(line.startswith("train 1/1") for line in lines)
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_classes: 10", "num_classes: 9", "num_classes: expected the 10 classes of the data source, found 9"),
        ("num_classes: 10", "num_clases: 10", "timm cannot create 'test_resnet'"),
        ("source: digits", "source: digit", "expected digits, fashion_mnist"),
        ("batch_size: 256", "batch_size: 2560", "at most the"),
        ("[1, 8, 8]", "[3, 8, 8]", "pretrained_cfg.input_size: expected 1 channels"),
    ],
)
def test_what_cannot_start_writes_nothing(tmp_path, old, new, words):
    assert old in SHORT
    with pytest.raises(CompressError) as error:
        run(write(tmp_path, text=SHORT.replace(old, new)))
    assert words in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("prune: {macs: 0.5, exclude: ['layer9.*']}", "02_prune: exclude: 'layer9.*' is no axis and matches no parameter"),
        ("prune: {macs: 0.1, min_keep: 0.9, criterion: thinet}", "02_prune: prune: cannot keep 10.0% of macs: the least reachable"),
        ("cluster: {bits: {'zz*': 4}}", "02_cluster: bits: 'zz*' matches none of the weights"),
        ("sparsify: {density: 0.5}, factorize: {macs: 0.7}", "03_factorize: lowrank: no layer of ResNet gets cheaper"),
        (
            "sparsify: {density: 0.5, criterion: snip}, finetune: {epochs: 1, lr: 1e-3, method: {blocks: }}",
            "03_finetune: blocks: expected a",
        ),
        ("finetune: {epochs: 1, lr: 1e-3, method: {groups: }}", "02_finetune: groups: ResNet has no groups"),
        ("finetune: {epochs: 1, lr: 1e-3, method: {exits: {exits: [layer9]}}}", "02_finetune: exits: ResNet has no module 'layer9'"),
        ("finetune: {epochs: 1, lr: 1e-3, method: {slim: }}, prune: {macs: 0.5}", "03_prune: analyze: SlimmableResNet runs at several"),
        ("prune: {macs: 0.5}, finetune: {epochs: 1, lr: 1e-3, distill: {teacher: nobody}}", "03_finetune: distill.teacher: timm cannot"),
        ("prune: {latency: 0.5}, finetune: {epochs: 1, lr: 1e-3, distill: {match: token}}", "03_finetune: distill: match: token: expected"),
    ],
)
def test_what_no_stage_could_do_is_said_before_training(tmp_path, stages, words):
    text = SHORT.replace("{{", "{").replace("}}", "}").replace("{output}", str(tmp_path / "out"))
    text = text.replace("prune: {macs: 0.6, round_to: 4, criterion: taylor}", stages)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = []
    with pytest.raises(RecipeError) as error:
        run(path, log=said.append)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not said
    assert [found.name for found in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_trained_weights_decide_is_not_judged_before(tmp_path):
    """As they are drawn, all singular values are alike, and ranks that keep nearly all of them save nothing."""
    stage = "prune: {{macs: 0.6, round_to: 4, criterion: taylor}}"
    source = write(tmp_path, text=SHORT.replace(stage, "factorize: {{energy: 0.99}}"))
    with pytest.raises(CompressError, match="no layer of ResNet gets cheaper"):
        zc.factorize(create(load_recipe(source)), energy=0.99)
    said = []
    with pytest.raises(CompressError, match="no layer of ResNet gets cheaper"):
        run(source, log=said.append)
    assert any(line.startswith("train 1/1") for line in said), "one epoch is not enough, but that was to be tried"


def test_two_runs_do_not_share_a_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="expected no other run"):
            run(write(tmp_path, text=SHORT))


ELASTIC = (
    START
    + """
  - train: {{epochs: 1, lr: 3e-3, method: {{METHOD}}}}
  - evaluate
  - save
measure: {{runs: 3}}
"""
)


@pytest.mark.parametrize("method", ["slim: {{widths: [0.5, 1.0]}}", "us: {{widths: [0.5, 1.0], calibration_batches: 2}}"])
def test_a_network_of_several_widths_has_a_row_for_each(tmp_path, method):
    record = run(write(tmp_path, text=ELASTIC.replace("METHOD", method)), log=lambda line: None)
    rows = {row.label: row for row in record.table}
    assert list(rows) == ["model ×1", "model ×0.5", "reloaded"]
    assert rows["model ×0.5"].macs < 0.5 * rows["model ×1"].macs
    assert rows["reloaded"].top1 == rows["model ×1"].top1 == record.step("01_train").metrics["top1"]
    evaluated = record.step("02_evaluate").metrics
    assert {label: metrics["top1"] for label, metrics in evaluated.items()} == {
        "evaluate ×1": rows["model ×1"].top1,
        "evaluate ×0.5": rows["model ×0.5"].top1,
    }
    net = timm.create_model(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True)
    assert net.widths == (0.5, 1.0)


EXITS = (
    START.replace("batch_size: 256", "batch_size: 256, held_out: 200")
    + """
  - train: {{epochs: 1, lr: 3e-3, method: {{exits: {{exits: 2, train: main}}}}}}
  - finetune: {{epochs: 1, lr: 3e-3, method: {{exits: {{train: heads, budget: 0.7}}}}}}
  - evaluate
  - save
measure: {{runs: 3}}
"""
)


def test_a_network_with_exits_has_a_row_for_each_and_one_for_thresholds(tmp_path):
    record = run(write(tmp_path, text=EXITS), log=lambda line: None)
    rows = {row.label: row for row in record.table}
    assert list(rows) == ["model", "model exit 0", "model exit 1", "model thresholds", "reloaded"]
    net = timm.create_model(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True).eval()
    costs = net.costs()
    assert rows["model"].macs == rows["reloaded"].macs == costs[-1]
    assert rows["model exit 0"].macs == costs[0]
    base = costs[-1] - sum(head.fc.weight.numel() for head in net.exits)
    assert rows["model thresholds"].macs / base == pytest.approx(0.7, abs=0.1)
    assert rows["model exit 0"].params < rows["model exit 1"].params < rows["model"].params
    # Heads alone leave the network as the first stage made it.
    assert record.step("01_train").metrics["top1"] == record.step("02_finetune").metrics["top1"] == rows["model"].top1
    assert rows["reloaded"].top1 == rows["model"].top1
    source = open_source(DataConfig(source="digits"), 1)
    loader = eval_loader(source, DataConfig(source="digits"), net)
    right = torch.cat([net.infer(x).argmax(1) == y for x, y in loader])
    assert rows["model thresholds"].top1 == pytest.approx(100 * float(right.double().mean()))
    evaluated = record.step("03_evaluate").metrics
    assert {label.replace("evaluate", "model"): found["top1"] for label, found in evaluated.items()} == {
        label: row.top1 for label, row in rows.items() if label != "reloaded"
    }


def test_widths_and_exits_together(tmp_path):
    method = "[{{exits: {{exits: 1, distill: 0.5}}}}, {{slim: {{widths: [0.5, 1.0]}}}}]"
    record = run(write(tmp_path, text=ELASTIC.replace("{{METHOD}}", method)), log=lambda line: None)
    rows = {row.label: row for row in record.table}
    assert list(rows) == ["model ×1", "model ×1 exit 0", "model ×0.5", "model ×0.5 exit 0", "reloaded"]
    assert rows["model ×0.5 exit 0"].macs < rows["model ×0.5"].macs < rows["model ×1"].macs
    assert rows["reloaded"].top1 == rows["model ×1"].top1


def test_netaug_leaves_the_architecture_as_it_was(tmp_path):
    record = run(write(tmp_path, text=ELASTIC.replace("METHOD", "netaug: {{r: 2, s: 1, calibration_batches: 2}}")), log=lambda line: None)
    assert [row.label for row in record.table] == ["model", "reloaded"]
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["architecture"] == "test_resnet"
    assert record.table[1].top1 == record.table[0].top1


def test_a_teacher_by_name(tmp_path, whole):
    teacher = f"local-dir:{whole[0] / 'out' / 'model'}"
    text = ELASTIC.replace("- train: ", "- finetune: ").replace("method: {{METHOD}}", f"distill: {{{{teacher: '{teacher}'}}}}")
    record = run(write(tmp_path, text=text), log=lambda line: None)
    assert record.status == "finished"
    with pytest.raises(RecipeError, match="timm cannot create 'nobody'"):
        run(write(tmp_path, "other", text=text.replace(teacher, "nobody")), log=lambda line: None)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("finetune: {{epochs: 1, lr: 3e-3, distill: {{teacher: nobody}}}}", "distill.teacher: timm cannot create 'nobody' with weights"),
        (
            "finetune: {{epochs: 1, lr: 3e-3, distill: {{match: token, teacher: local-dir:{output}/model}}}}",
            "match: token: expected a model with a distillation token, found ResNet",
        ),
        ("cluster: {{bits: {{'nothing.*': 4}}}}", "bits: 'nothing.*' matches none of the weights"),
        ("cluster: {{bits: 8}}", "expected at least the 256 values of 8 bits, found 144; exclude it"),
        ("sparsify: {{density: 0.5, exclude: [nothing]}}", "exclude: 'nothing' matches none of the weights"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_training(tmp_path, stage, said):
    text = START + f"  - train: {{{{epochs: 1, lr: 3e-3}}}}\n  - {stage}\n"
    with pytest.raises(CompressError, match=re.escape(said)):
        run(write(tmp_path, text=text), log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_cannot_see_the_students_images(tmp_path):
    cfg = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10, "in_chans": 1}
    zc.save(timm.create_model("deit_tiny_patch16_224", **args, pretrained_cfg_overlay=cfg), tmp_path / "teacher")
    stage = "finetune: {{epochs: 1, lr: 3e-3, distill: {{teacher: 'local-dir:%s'}}}}" % (tmp_path / "teacher")
    with pytest.raises(CompressError, match=r"the student's images of \(1, 8, 8\) in float32, found VisionTransformer: AssertionError"):
        run(write(tmp_path, text=START + f"  - train: {{{{epochs: 1, lr: 3e-3}}}}\n  - {stage}\n"), log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_the_run_itself_saves(tmp_path):
    learn = "finetune: {{epochs: 1, lr: 3e-3, distill: {{teacher: 'local-dir:{output}/big'}}}}"
    stages = f"  - train: {{{{epochs: 1, lr: 3e-3}}}}\n  - save: {{{{to: big}}}}\n  - {learn}\n"
    assert run(write(tmp_path, text=START + stages + "measure: {{runs: 1}}\n"), log=lambda line: None).status == "finished"


def test_what_a_method_makes_of_the_network_is_what_is_reported(tmp_path):
    """Blocks that end below `least` are removed after training: the record has the accuracy without them, as the file does."""
    stages = "  - train: {{epochs: 1, lr: 3e-3, method: {{blocks: {{penalty: 0.1, least: 1.0}}}}}}\n  - save\nmeasure: {{runs: 1}}\n"
    record = run(write(tmp_path, text=START + "\n" + stages), log=lambda line: None)
    model = zc.load(tmp_path / "out" / "model")
    assert model._model_args["variant"]["removed"] == ["layer1.0"]
    data = DataConfig(source="digits")
    assert record.step("01_train").metrics["loss"] == evaluate(model, eval_loader(open_source(data, 1), data, model))["loss"]


def test_drop_rates_hold_in_every_stage(tmp_path, monkeypatch):
    """timm's files leave them out, and stages hand models on as files: networks were trained without the dropout asked for."""
    trained = []

    def watched(model, *args, **kwargs):
        if not kwargs["dry"]:
            trained.append((model.drop_rate, [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")][-1]))
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(actions, "fit", watched)
    text = START.replace("in_chans: 1}}", "in_chans: 1, drop_rate: 0.5, drop_path_rate: 0.25}}")
    tuned = "  - finetune: {{epochs: 1, lr: 1e-3}}\n"
    stages = (
        "  - train: {{epochs: 1, lr: 1e-3}}\n  - prune: {{macs: 0.6, round_to: 4}}\n"
        + tuned
        + "  - factorize: {{macs: 0.9}}\n"
        + tuned
        + "  - save\n"
    )
    run(write(tmp_path, text=text + stages), log=print)
    assert trained == [(0.5, 0.25)] * 3
    assert zc.load(tmp_path / "out" / "model").drop_rate == 0


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path, device):
    with pytest.raises(CompressError, match=f"device: expected one of this machine, found '{device}'"):
        run(write(tmp_path, text=SHORT + f"device: '{device}'\n"))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match=r"file/out"):
        run(write(tmp_path, "file/out", text=SHORT))
