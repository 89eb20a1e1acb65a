"""The command line: each command against the function it stands for, and errors in one line."""

import re

import pytest
import timm
import torch
from click.testing import CliRunner

import zoo_compress as zc
from zoo_compress.cli import cli, load_model

TINY = ["-a", "num_classes=10", "-a", "in_chans=1"]
GREY = ["-a", "pretrained_cfg_overlay={input_size: [1, 32, 32], mean: [0.5], std: [0.5]}"]


def invoke(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model pruned through the command line, and what the command said."""
    folder = tmp_path_factory.mktemp("cli") / "small"
    return folder, invoke("prune", "test_resnet", "--macs", 0.5, "--round-to", 4, "-o", folder, *TINY).output


COMMANDS = [
    "run",
    "compare",
    "rethink",
    "lottery",
    "exits",
    "inspect",
    "prune",
    "eval",
    "measure",
    "coverage",
    "list",
    "pull",
    "push",
    "card",
    "verify",
    "publish",
    "ship",
    "export",
    "factorize",
    "separate",
    "sparsify",
    "cluster",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    text = invoke(command, "--help").output
    lines = text[text.index("Examples:") :].splitlines()[1:]
    assert lines
    assert all("zoo-compress " in line or "recipes/" in line or "torchrun " in line for line in lines if line.strip())


def test_help_lists_the_commands():
    text = invoke("--help").output
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert set(COMMANDS) == cli.commands.keys()


@pytest.mark.parametrize(("command", "takes_folders"), [("pull", False), ("verify", True), ("export", True)])
def test_help_says_who_takes_a_folder(command, takes_folders):
    assert ("or a folder" in " ".join(invoke(command, "--help").output.split())) == takes_folders


def test_inspect_shows_layout_and_costs():
    output = invoke("inspect", "test_resnet", *TINY).output
    layout = zc.analyze(timm.create_model("test_resnet", num_classes=10, in_chans=1))
    assert str(layout).splitlines()[0] in output
    assert f"{layout.macs():,} MACs" in output
    assert f"{layout.num_params():,} parameters" in output
    for axis in layout.axes.values():
        assert not axis.frozen or axis.frozen in output


def test_prune_saves_what_it_says(saved):
    folder, output = saved
    small = zc.analyze(timm.create_model(f"local-dir:{folder}", pretrained=True))
    dense = zc.analyze(timm.create_model("test_resnet", num_classes=10, in_chans=1))
    assert small.macs() / dense.macs() == pytest.approx(0.5, abs=0.02)
    assert f"{small.macs():,}" in output
    assert f"{small.num_params():,}" in output
    assert "nothing was fine-tuned" in output


def test_prune_looks_at_images(tmp_path):
    """The command is the function with the images of the data source."""
    options = ["--macs", 0.6, "--criterion", "thinet", "--reconstruct", "--data", "digits", "--images", 40]
    output = invoke("prune", "test_resnet", *options, "-o", tmp_path / "a", *TINY, *GREY).output
    assert "nothing was fine-tuned" in output
    small = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    invoke("prune", "test_resnet", "--macs", 0.6, "-o", tmp_path / "b", *TINY, *GREY)
    plain = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True)
    assert zc.analyze(small).macs() == pytest.approx(zc.analyze(plain).macs(), rel=0.05)
    output = invoke("prune", "no_such_model", "--macs", 0.6, "--reconstruct", "-o", tmp_path / "c", code=2).output
    assert "--reconstruct: expected --data" in output, "known before anything is loaded"


def test_prune_leaves_a_folder_with_files_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    result = invoke("prune", "test_resnet", "--macs", 0.5, "-o", tmp_path, code=2)
    assert "expected a new or empty folder" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_eval_agrees_with_torch(saved):
    from zoo_compress.training.config import DataConfig
    from zoo_compress.training.data import eval_loader
    from zoo_compress.training.sources import open_source

    folder, _ = saved
    output = invoke("eval", folder, "--data", "digits", "--batch-size", 100).output
    model, source = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), open_source(DataConfig(source="digits"), 1)
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in eval_loader(source, DataConfig(source="digits"), model)]
    assert f"top-1 {100 * torch.cat(hits).mean():.2f}%" in output


def test_measure_compares(saved):
    folder, _ = saved
    output = invoke("measure", f"local-dir:{folder}", "test_resnet", "--runs", 3, "--threads", 1).output
    assert f"local-dir:{folder}" in output
    assert "batch 1, 1 thread\n" in output
    assert f"{sum(p.numel() for p in timm.create_model('test_resnet').parameters()):,}" in output


def test_prune_by_measuring(tmp_path, monkeypatch):
    from zoo_compress.profiling import search

    monkeypatch.setattr(search, "LATENCY_TOLERANCE", 1.0)  # this machine may be busy
    output = invoke("prune", "test_resnet", "--latency", 0.6, "--round-to", "auto", "--threads", 1, "-o", tmp_path / "fast", *TINY).output
    assert "ms a pass" in output
    assert "batch 1, 1 thread\n" in output
    timm.create_model(f"local-dir:{tmp_path / 'fast'}", pretrained=True)


def test_exits_prints_the_curve_of_a_recipes_result(tmp_path):
    pytest.importorskip("matplotlib")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {{name: test_resnet, args: {{num_classes: 10, in_chans: 1}}, pretrained_cfg: {{input_size: [1, 8, 8]}}}}
data: {{source: digits, batch_size: 256, held_out: 200}}
output: {tmp_path / "out"}
stages: [train: {{epochs: 1, lr: 1e-3, method: {{exits: {{exits: 2}}}}}}, save]
measure: {{runs: 2}}
""")
    table = invoke("run", recipe).output
    output = invoke("exits", tmp_path / "out", "--budget", 0.6, "--plot", tmp_path / "exits.png").output
    assert "budget 60%" in output
    assert "200 training images, which were held out of training" in output
    ends = [re.search(rf"^{label} .*?(\d+\.\d\d)%", text, re.M)[1] for label, text in (("model exit 0", table), ("exit 0", output))]
    assert ends[0] == ends[1]
    assert (tmp_path / "exits.png").stat().st_size > 1000
    saved = tmp_path / "out" / "model"
    output = invoke("exits", saved, saved, "--data", "digits", "--held-out", 50, "--budget", 0.6).output
    assert "50 training images, which may have been trained on" in output
    assert "± 0.00%" in output
    assert "expected --held-out" in invoke("exits", saved, "--data", "digits", code=2).stderr
    assert "expected --data, or the output folder of a recipe" in invoke("exits", saved, code=2).stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "resnet_18"], "did you mean resnet18"),
        (["inspect", "no/such/folder"], "expected a name of timm.list_models(), local-dir:PATH"),
        (["inspect", "local-dir:/no/such/folder"], "expected a directory with config.json"),
        (["inspect", "test_resnet", "-a", "num_clases=3"], "timm cannot create it with {'num_clases': 3}"),
        (["inspect", "test_resnet", "-a", "3"], "--arg: expected NAME=VALUE, found '3'"),
        (["prune", "test_resnet", "-o", "new"], "exactly one of"),
        (["prune", "test_resnet", "-o", "new", "--macs", "0.5", "--keep", "0.5"], "exactly one of"),
        (["prune", "test_resnet", "-o", "new", "--macs", "0.5", "--latency", "0.5"], "exactly one of"),
        (["eval", "test_resnet", "--data", "digits"], "expected the 10 classes of the data source, found 1000"),
        (["run", "no/such/recipe.yaml"], "cannot read the recipe"),
    ],
)
def test_errors_are_one_line(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*args, code=2)
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_arguments_are_written_as_in_yaml():
    model = load_model("test_resnet", args=["num_classes=3", "drop_rate=0.5", "global_pool=max"])
    assert (model.num_classes, model.drop_rate, model.global_pool.pool_type) == (3, 0.5, "max")


def test_bugs_keep_their_traceback(monkeypatch):
    def bug(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("zoo_compress.cli.models.load_model", bug)
    result = CliRunner().invoke(cli, ["inspect", "test_resnet"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_factorize_saves_what_it_plans(tmp_path):
    options = ["--macs", 0.8, "--data", "digits", "--images", 32, "-o", tmp_path / "low", *TINY]
    output = invoke("factorize", "test_vit", *options, code=2).output
    assert "model.pretrained_cfg.input_size: expected 1 channels as in the model, found 3" in output
    grey = ["-a", "img_size=32", *GREY]
    output = invoke("factorize", "test_vit", *options, *grey).output
    assert f"→ {zc.analyze(zc.load(tmp_path / 'low')).macs():,} (" in output
    assert "a classifier: made anew for other classes" in output
    refused = invoke("factorize", "no_such_model", "--macs", 0.8, "-o", tmp_path / "low", code=2).output
    assert "expected a new or empty folder, found files in it" in refused, "before anything is made"


def test_separate_saves_what_it_plans(tmp_path):
    output = invoke("separate", "test_resnet", "-o", tmp_path / "separable", *TINY).output
    assert f"→ {zc.analyze(zc.load(tmp_path / 'separable')).num_params():,} (" in output


def test_sparsify_and_cluster_save_what_they_say(tmp_path):
    options = (
        "--density",
        0.2,
        "--criterion",
        "snip",
        "--data",
        "digits",
        "--images",
        32,
        "--exclude",
        "fc.*",
        "-a",
        "zero_init_last=false",
    )
    output = invoke("sparsify", "test_resnet", *options, "-o", tmp_path / "thin", *TINY[:2]).output
    size = (tmp_path / "thin" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in output
    assert (zc.load(tmp_path / "thin").layer1[0].conv2.weight == 0).any()
    invoke("sparsify", "test_resnet", "--pattern", "2:4", "-o", tmp_path / "thin", *TINY, code=2)  # not empty any more
    bad = invoke("sparsify", "test_resnet", "--density", 2, "-o", tmp_path / "bad", *TINY, code=2)
    assert "density: expected the fraction of weights to keep" in bad.output
    unfit = invoke("sparsify", "test_resnet", *options, "-o", tmp_path / "bad", *TINY, code=2)
    assert "model.pretrained_cfg.input_size: expected 1 channels as in the model, found 3" in unfit.output
    invoke("cluster", "test_resnet", "--bits", 3, "-o", tmp_path / "few", *TINY)
    assert len(zc.load(tmp_path / "few").fc.weight.unique()) <= 8


def test_arguments_that_yaml_takes_for_a_date():
    assert (
        "--arg num_classes: expected a value as in YAML, found '2000-13-45'"
        in invoke("measure", "test_resnet", "-a", "num_classes=2000-13-45", code=2).stderr
    )
