"""Model cards: every number is the record's, the recipe reads as the one that ran, the snippet runs, the weights keep its word."""

import json
import re
import shutil
import struct

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

import zoo_compress as zc
from zoo_compress.errors import CompressError
from zoo_compress.recipe import load_recipe
from zoo_compress.record import Row, read_record, write_record
from zoo_compress.sharing import card, picture
from zoo_compress.sharing.front_matter import KEY, dataset
from zoo_compress.sharing.verify import read_card, verify_card


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run's output folder, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "out")


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    """A run, its card as the client reads it, and its text."""
    out = shutil.copytree(finished[0], tmp_path_factory.mktemp("card") / "out")
    folder = card.write(out)
    return out, ModelCard.load(folder / "README.md"), (folder / "README.md").read_text()


def block(text, language):
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


def test_front_matter(written):
    out, found, _ = written
    data, record = found.data.to_dict(), read_record(out)
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == timm.get_pretrained_cfg("test_resnet").hf_hub_id
    assert data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["digits"]
    assert {"timm", "zoo_compress", "pruned"} <= set(data["tags"])
    metrics = {result.metric_type: result.metric_value for result in found.data.eval_results}
    row = record.table[-1]
    evaluated = next(step.metrics for step in record.steps if step.kind == "evaluate")
    assert metrics == {
        "accuracy": row.top1,
        "top5": evaluated["top5"],
        "loss": evaluated["loss"],
        "parameters": row.params,
        "macs": row.macs,
        "size": (out / "model/model.safetensors").stat().st_size,
        "latency": row.latency_ms,
    }


def test_accuracy_on_a_folder_of_images_is_of_so_many(run):
    """Others' leaderboards would take 250 photos in a folder `imagenet` for ImageNet."""
    record = read_record(run)
    data = {**record.recipe["data"], "source": "imagefolder:photos/imagenet"}
    write_record(run, record.model_copy(update={"recipe": {**record.recipe, "data": data}}))
    results = ModelCard.load(card.write(run) / "README.md").data.eval_results
    assert {result.dataset_type for result in results} == {"imagenet"}
    assert {result.dataset_name for result in results} == {f"imagenet, {record.table[-1].test_images:,} images"}


def test_text_has_the_records_numbers(written):
    out, _, text = written
    record = read_record(out)
    for row in record.table:
        assert f"| {row.label} | {row.params:,} | {row.macs:,}" in text
        assert f"{row.top1:.2f}%" in text
    for name, version in record.versions.items():
        assert f"| {name} | {version} |" in text
    assert f"| seed | {record.seed} |" in text
    assert record.machine["processor"] in text
    assert "trained from scratch on `digits`" in text
    assert "On the 355 test images of `digits`" in text


def test_baselines_that_were_not_measured_are_named(written, run):
    assert "Not measured: the same structure trained from scratch" in written[2]
    record = read_record(run)
    extra = record.table[-1].model_copy(update={"label": "Scratch-E", "top1": 12.25})
    write_record(run, record.model_copy(update={"baselines": (extra,)}))
    text = (card.write(run) / "README.md").read_text()
    assert "Not measured" not in text
    assert "Scratch-E: top-1 12.25%" in text
    assert "| Scratch-E | " in text


def test_the_recipe_is_the_one_that_ran(written, tmp_path):
    out, _, text = written
    (tmp_path / "recipe.yaml").write_text(block(text, "yaml"))
    assert load_recipe(tmp_path / "recipe.yaml").sha256 == read_record(out).recipe_sha256


def test_the_snippet_runs(written, monkeypatch, capsys):
    out, _, text = written
    monkeypatch.chdir(out / "model")
    exec(compile(block(text, "python"), "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([1, 10])\n"


def test_the_same_run_gives_the_same_card(written):
    out, _, text = written
    picture_before = (out / "model/widths.png").read_bytes()
    card.write(out)
    assert (out / "model/README.md").read_text() == text
    assert (out / "model/widths.png").read_bytes() == picture_before


def test_picture(written):
    out, _, text = written
    header = (out / "model/widths.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:])) > 100
    assert "](widths.png)" in text
    model = zc.load(out / "model")
    layers = {name: (before, now) for name, before, now in picture.widths(model)}
    base = dict(timm.create_model("test_resnet", num_classes=10, in_chans=1).named_modules())
    now = dict(model.named_modules())
    assert layers
    for name, sizes in layers.items():
        assert sizes == (base[name].weight.shape[0], now[name].weight.shape[0])
    assert any(after < before for before, after in layers.values())


def test_spread_over_seeds(run, finished):
    text = (card.write(run, [finished[1]]) / "README.md").read_text()
    top1 = torch.tensor([read_record(folder).table[-1].top1 for folder in finished], dtype=torch.float64)
    assert f"top-1 {top1.mean():.2f} ± {top1.std():.2f}% (mean and standard deviation of 2 runs), seeds 0, 1" in text
    for rows in zip(*(read_record(folder).table for folder in finished), strict=True):
        top1 = torch.tensor([row.top1 for row in rows], dtype=torch.float64)
        assert re.search(rf"\| {rows[0].label} \|.*\| {top1[0]:.2f}% \({top1.mean():.2f} ± {top1.std():.2f}\) \|", text)
    with pytest.raises(CompressError, match="with another seed"):
        card.write(run, [finished[0]])


def test_a_seed_from_before_an_option_existed_counts(run, finished, tmp_path):
    other = shutil.copytree(finished[1], tmp_path / "older")
    record = read_record(other)
    recipe = {**record.recipe, "data": {key: value for key, value in record.recipe["data"].items() if key != "held_out"}}
    write_record(other, record.model_copy(update={"recipe": recipe}))
    assert "(mean and standard deviation of 2 runs), seeds 0, 1" in (card.write(run, [other]) / "README.md").read_text()


def test_runs_that_are_none(tmp_path, run):
    with pytest.raises(CompressError, match="expected the output folder of a run"):
        card.write(tmp_path / "nothing")
    write_record(run, read_record(run).model_copy(update={"status": "running"}))
    with pytest.raises(CompressError, match="expected a finished run"):
        card.write(run)


def test_the_license_is_that_of_the_weights_it_started_from(run):
    """Of weights in a folder their config.json knows it; cards said "other"."""
    record, config = read_record(run), run / "model/config.json"
    recipe = record.recipe | {"model": record.recipe["model"] | {"name": "local-dir:mine", "pretrained": True}}
    write_record(run, record.model_copy(update={"recipe": recipe}))
    stored = json.loads(config.read_text())
    config.write_text(json.dumps(stored | {"pretrained_cfg": stored["pretrained_cfg"] | {"license": "bsd-3-clause"}}))
    assert ModelCard.load(card.write(run) / "README.md").data.license == "bsd-3-clause"


def test_what_was_not_measured_of_a_slimmable_network(tmp_path):
    net = zc.slim(timm.create_model("test_resnet", num_classes=10), widths=(0.5, 1.0))
    zc.save(net, tmp_path)
    assert "Not measured: each width trained alone." in card.plain(net, tmp_path, "me/slim")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("hfds/me/birds", "me/birds"),
        ("torch/cifar10", "cifar10"),
        ("imagefolder:/home/me/x", "x"),
        ("imagefolder:.", "imagefolder"),
    ],
)
def test_data_sets_are_named_without_paths(source, name):
    assert dataset(source) == name


class TestVerify:
    @pytest.fixture
    def folder(self, written, tmp_path):
        return shutil.copytree(written[0] / "model", tmp_path / "model")

    def change(self, folder, change):
        path = folder / "README.md"
        head, text = path.read_text().removeprefix("---\n").split("\n---\n", 1)
        data = yaml.safe_load(head)
        change(data)
        path.write_text(f"---\n{yaml.safe_dump(data)}\n---\n{text}")

    def test_a_true_card(self, folder, written):
        done = verify_card(str(folder))
        assert done.found == done.top1 == read_record(written[0]).table[-1].top1
        assert done.images == 355

    def test_other_accuracy(self, folder):
        self.change(folder, lambda data: data["zoo_compress"].update(top1=data["zoo_compress"]["top1"] + 1.5))
        with pytest.raises(CompressError, match=r"top-1: the card says .* found .* on 355 images"):
            verify_card(str(folder))

    def test_other_accuracy_for_people_only(self, folder):
        self.change(folder, lambda data: data["model-index"][0]["results"][0]["metrics"][0].update(value=99.9))
        with pytest.raises(CompressError, match=r"top-1 in its model-index: the card says 99\.9"):
            verify_card(str(folder))

    @pytest.mark.parametrize(("key", "word"), [("params", "parameters"), ("macs", "MACs"), ("weights_sha256", "sha256")])
    def test_other_facts(self, folder, key, word):
        value = {"weights_sha256": "0" * 64}.get(key, 5)
        self.change(folder, lambda data: data["zoo_compress"].update({key: value}))
        with pytest.raises(CompressError, match=f"do not do what its card says: .*{word}"):
            verify_card(str(folder))

    def test_other_weights(self, folder):
        model = zc.load(folder)
        with torch.no_grad():
            model.fc.weight.zero_()
        zc.save(model, folder)
        with pytest.raises(CompressError, match=r"sha256.*top-1: the card says"):
            verify_card(str(folder))

    @pytest.mark.parametrize(
        "text", [None, "", "no front matter", "---\nlicense: mit\n---\n", "---\nzoo_compress: [\n---\n", "---\nzoo_compress: 3\n---\n"]
    )
    def test_no_numbers(self, folder, text):
        (folder / "README.md").unlink() if text is None else (folder / "README.md").write_text(text)
        with pytest.raises(CompressError, match="expected a card"):
            verify_card(str(folder))


def test_rows_are_a_list():
    """Nothing counts the rows: models with several widths or exits have more."""
    values = {"params": 1, "macs": 1, "top1": 1.0, "latency_ms": 1.0, "latency_iqr_ms": 0.0, "weight_memory": 1, "activation_memory": 1}
    rows = [Row(label=f"width {i}", batch_size=1, threads=1, **values) for i in range(4)]
    assert [card._cells(row, rows[0], {"size": 1})[0] for row in rows] == [row.label for row in rows]


def test_config_of_the_card_is_json(written):
    assert json.loads(json.dumps(written[1].data.to_dict()["zoo_compress"]))["format"] == 1


@pytest.mark.parametrize(
    ("make", "says"), [(zc.slim, "model.set_width"), (lambda m: zc.add_exits(m, 2), "model.infer"), (None, "ordinary")]
)
def test_a_card_says_what_the_model_can_do(tmp_path, make, says):
    model = timm.create_model("test_resnet", num_classes=10)
    model = make(model) if make else model
    zc.save(model, tmp_path)
    text = card.plain(model, tmp_path, "me/model")
    card.draw(card.Subject(model, tmp_path, "me/model"), tmp_path)
    assert says in text
    assert ("features_only" in text) == (make is None)


def test_a_card_of_aliases_of_aliases_is_refused_at_once(tmp_path):
    """A few hundred bytes that stand for 10**15 values: a card comes from a stranger."""
    lines = ["---", "library_name: timm", f"{KEY}:"]
    lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 20)}]" for i in range(12)]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", "# A card"]))
    with pytest.raises(CompressError, match="expected at most 100000 values, found more"):
        read_card(tmp_path)
