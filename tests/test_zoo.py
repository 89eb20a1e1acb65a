"""The shipped zoo: every entry is what it says, loads offline by name, and names no weights that are not there."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

import zoo_compress as zc
from zoo_compress.cli import cli
from zoo_compress.errors import CompressError
from zoo_compress.plugin.hub import load
from zoo_compress.plugin.weights import digest
from zoo_compress.recipe import load_recipe
from zoo_compress.record import read_record, write_record
from zoo_compress.sharing.pull import packaged, pull
from zoo_compress.sharing.recipe_text import recipe_of
from zoo_compress.sharing.ship import cards_table, publish, rebuilt, ship
from zoo_compress.sharing.verify import verify_card
from zoo_compress.zoo import index

ROOT = Path(__file__).parents[1]
ENTRIES = index.read().variants
PACKAGED = [entry for entry in ENTRIES if entry.checkpoint]
HALF = "test_resnet__pruned.digits_half"


def invoke(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
class TestEntries:
    def test_recipe_exists(self, entry):
        load_recipe(ROOT / "recipes" / entry.recipe)

    def test_weights_are_what_it_says(self, entry):
        if not entry.checkpoint:
            assert entry.recipe or entry.hub_id
            return
        weights = entry.folder / "model.safetensors"
        assert (digest(weights), weights.stat().st_size) == (entry.sha256, entry.size)
        assert entry.size < 1_000_000
        others = {f"seed{read_record(folder).seed}" for folder in entry.folder.glob("seed*")}
        assert {path.name for path in entry.folder.iterdir()} == {"config.json", "model.safetensors", "results.json", *others}

    def test_numbers_are_the_records(self, entry):
        if not entry.checkpoint:
            return
        record = read_record(entry.folder)
        first, last = record.table[0], record.table[-1]
        assert (entry.top1, entry.macs, entry.params) == (round(last.top1, 4), last.macs, last.params)
        if first.label.startswith("before "):
            assert (entry.base_macs, entry.base_params) == (first.macs, first.params)
        if first.label.startswith("before ") and first.top1 > 50:  # trained
            assert entry.base_top1 == round(first.top1, 4)
        else:  # what training made of a model, or an untrained one, says nothing of that model; nor does one with masks
            whole = [row.top1 for row in record.baselines if (row.file_bytes or 0) >= 4 * entry.base_params]
            assert entry.base_top1 == (round(whole[0], 4) if whole else None)
        of_file = load_recipe(ROOT / "recipes" / entry.recipe)
        assert recipe_of(record.recipe).model_copy(update={"seed": of_file.seed, "output": of_file.output}) == of_file

    def test_loads_by_name(self, entry):
        if not entry.checkpoint:
            return
        model = timm.create_model(entry.name, pretrained=True).eval()
        layout = zc.analyze(model)
        assert (layout.num_params(), layout.macs()) == (entry.params, entry.macs)
        local = zc.load(entry.folder).eval()
        images = torch.randn(2, *model.pretrained_cfg["input_size"])
        assert torch.equal(model(images), local(images))

    def test_has_a_card(self, entry):
        assert (ROOT / "model_cards" / f"{entry.name}.md").is_file()
        assert f"]({entry.name}.md)" in (ROOT / "model_cards/README.md").read_text()


def test_nothing_lies_around_unnamed():
    assert {path.name for path in index.CHECKPOINTS.iterdir()} == {entry.checkpoint for entry in PACKAGED}
    cards = {path.stem for path in (ROOT / "model_cards").glob("*.md")} - {"README"}
    assert cards == {entry.name for entry in ENTRIES}


def test_cards_were_not_edited(tmp_path):
    assert (ROOT / "model_cards/README.md").read_text() == cards_table(index.read())
    for entry in PACKAGED:
        text = (pull(entry.name, tmp_path / entry.name) / "README.md").read_text()
        assert (ROOT / f"model_cards/{entry.name}.md").read_text() == text.replace("widths.png", f"{entry.name}.png")


def test_a_small_one_keeps_its_cards_word():
    entry = index.find(HALF)
    assert verify_card(HALF).top1 == pytest.approx(entry.top1, abs=1e-3)


class TestNames:
    def test_offline_in_a_fresh_process(self):
        program = f"import timm, zoo_compress; print(timm.create_model({HALF!r}, pretrained=True).num_classes)"
        environment = {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
        }
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, env=environment)
        assert out.stdout == "10\n", out.stderr

    def test_timm_knows_it(self):
        assert HALF in timm.list_models(pretrained=True)
        assert HALF in timm.list_pretrained()
        cfg = timm.get_pretrained_cfg(HALF)
        assert (cfg.tag, cfg.num_classes, cfg.input_size) == ("digits_half", 10, (1, 32, 32))

    def test_arguments_of_timm(self):
        dense = timm.create_model("test_resnet", in_chans=1, features_only=True).feature_info.channels()
        channels = timm.create_model(HALF, pretrained=True, features_only=True).feature_info.channels()
        assert all(now <= before for now, before in zip(channels, dense, strict=True))
        assert sum(channels) < sum(dense)
        assert timm.create_model(HALF, pretrained=True, num_classes=3).num_classes == 3
        rgb = timm.create_model(HALF, pretrained=True, in_chans=3).eval()
        assert rgb(torch.randn(1, 3, 32, 32)).shape == (1, 10)

    def test_without_weights_it_is_the_structure(self):
        model, trained = timm.create_model(HALF), timm.create_model(HALF, pretrained=True)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        assert shapes == {name: value.shape for name, value in trained.state_dict().items()}
        assert not torch.equal(model.fc.weight, trained.fc.weight)

    def test_saved_again(self, tmp_path):
        model = timm.create_model(HALF, pretrained=True)
        zc.save(model, tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == (index.find(HALF).folder / "model.safetensors").read_bytes()

    def test_the_name_without_a_tag_is_the_architecture(self):
        with pytest.raises(CompressError, match="expected one of keep="):
            timm.create_model("test_resnet__pruned", pretrained=True)
        assert timm.create_model("test_resnet__pruned", keep=0.5).num_classes == 1000

    def test_a_budget_beside_a_tag(self):
        with pytest.raises(CompressError, match="keep given with a stored variant"):
            timm.create_model(HALF, pretrained=True, keep=0.5)

    def test_the_command_line_takes_it(self):
        assert "frozen" in invoke("inspect", HALF).output
        assert f"top-1 {index.find(HALF).top1:.2f}%" in invoke("eval", HALF, "--data", "digits").output


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.checkpoint], ids=lambda entry: entry.name)
def test_what_only_a_recipe_makes_says_so(entry):
    assert (ROOT / "recipes" / entry.recipe).is_file()
    with pytest.raises(
        CompressError, match=rf"no published checkpoint '{entry.tag}'; its recipe makes it: zoo-compress run recipes/{entry.recipe}"
    ):
        timm.create_model(entry.name, pretrained=True)


class TestList:
    def test_by_name_or_base(self):
        assert [v.name for v in zc.list_variants()] == sorted(entry.name for entry in ENTRIES)
        assert HALF in [v.name for v in zc.list_variants("test_resnet*")]
        assert HALF in [v.name for v in zc.list_variants("test_resnet")]
        assert HALF in [v.name for v in zc.list_variants("*.digits_half")]
        assert zc.list_variants("vit*") == []

    def test_lines(self):
        (found,) = zc.list_variants(HALF)
        entry = index.find(HALF)
        assert (found.base, found.method, found.source) == ("test_resnet", "pruned", "packaged")
        assert (found.top1, found.macs, found.params, found.size) == (entry.top1, entry.macs, entry.params, entry.size)

    def test_command(self):
        output = invoke("list", "test_resnet*").output
        entry = index.find(HALF)
        numbers = f"{entry.top1:.2f}% +{entry.macs:,} +{entry.params:,} +{entry.size:,}"
        assert re.search(rf"{re.escape(HALF)} +digits +{numbers} +packaged", output)
        assert "no variant's name" in invoke("list", "vit*", code=2).stderr


GOOD = json.loads(index.INDEX.read_text())["variants"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format"),
        ({"variants": [{**GOOD, "top1": 101.0}]}, "top1"),
        ({"variants": [{**GOOD, "macs": "1"}]}, "macs"),
        ({"variants": [{**GOOD, "sha256": "0"}]}, "sha256"),
        ({"variants": [{**GOOD, "name": "resnet18"}]}, "name"),
        ({"variants": [{**GOOD, "checkpoint": "../../etc"}]}, "checkpoint"),
        ({"variants": [{**GOOD, "more": 1}]}, "more"),
        ({"variants": [GOOD, GOOD]}, "is there twice"),
        ({"variants": [{**GOOD, "checkpoint": None, "recipe": None}]}, "nobody could have it"),
    ],
)
def test_an_index_is_checked(tmp_path, change, said):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"format": 1, "variants": [], **change}))
    with pytest.raises(CompressError, match=said):
        index.read(path)
    path.write_text("{")
    with pytest.raises(CompressError, match="expected an index"):
        index.read(path)


class TestPull:
    def test_packaged(self, tmp_path):
        invoke("pull", HALF, "-o", tmp_path / "there")
        assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "there").iterdir()}
        assert verify_card(str(tmp_path / "there")).images == 355

    def test_from_the_hub(self, hub, tmp_path):
        zc.push_to_hub(pull(HALF, tmp_path / "a"), "me/half", tag="v1")
        pull("me/half@v1", tmp_path / "b")
        same = {
            name: (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
            for name in ("config.json", "model.safetensors")
        }
        assert all(same.values())
        invoke("verify", "me/half@v1")

    @pytest.mark.parametrize(
        ("name", "said"),
        [("test_resnet__pruned.nope", "expected a name of"), ("me/nothing", "no such repository"), ("me/x@a@b", "expected OWNER/NAME")],
    )
    def test_what_is_not_there(self, hub, tmp_path, name, said):
        with pytest.raises(CompressError, match=said):
            pull(name, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_fills_meanwhile(self, tmp_path, monkeypatch):
        there = tmp_path / "there"

        def slow(folder):
            there.mkdir(exist_ok=True)
            (there / "mine").write_text("mine")
            return load(folder)

        monkeypatch.setattr("zoo_compress.sharing.pull.load", slow)
        with pytest.raises(CompressError, match=r"there: expected a new or empty folder.* not empty"):
            pull(HALF, there)
        assert [path.name for path in tmp_path.rglob("*")] == ["there", "mine"]

    def test_folders_with_files_are_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(CompressError, match="expected a new or empty folder"):
            pull(HALF, tmp_path)


class TestPublish:
    @pytest.fixture
    def file(self, tmp_path):
        """A copy of the zoo that is in the package, to be written to."""
        shutil.copytree(index.CHECKPOINTS, tmp_path / "zoo/checkpoints")
        (tmp_path / "zoo/index.json").write_text(index.dump(index.Index(variants=tuple(PACKAGED))))
        return tmp_path / "zoo/index.json"

    def test_all_then_nothing(self, hub, file):
        lines = []
        done = publish("me", file=file, tag="v1", log=lines.append)
        assert [pushed.changed for pushed in done] == [True] * len(PACKAGED)
        assert set(hub.repos) == {f"me/{entry.name}" for entry in PACKAGED}
        for entry in index.read(file).variants:
            assert entry.hub_id == f"me/{entry.name}@v1"
            again = timm.create_model(f"hf-hub:{entry.hub_id}", pretrained=True)
            shipped = timm.create_model(entry.name, pretrained=True)
            assert all(torch.equal(value, again.state_dict()[name]) for name, value in shipped.state_dict().items())
            assert f'"hf-hub:me/{entry.name}"' in hub.files(f"me/{entry.name}")["README.md"].decode()
        hub.log.clear()
        assert [pushed.changed for pushed in publish("me", file=file, tag="v1", log=lines.append)] == [False] * len(PACKAGED)
        assert not {"commit", "upload", "tag", "create"} & set(hub.steps())

    def test_stopped_in_the_middle(self, hub, file):
        with hub.fault("commit", status=500, times=1), pytest.raises(CompressError, match=rf"1 of {len(PACKAGED)} variants .*status 500"):
            publish("me", file=file, log=lambda line: None)
        first, *others = index.read(file).variants
        assert first.hub_id is None
        assert all(entry.hub_id for entry in others)
        assert [pushed.changed for pushed in publish("me", file=file, log=lambda line: None)] == [True, *[False] * len(others)]
        assert all(entry.hub_id for entry in index.read(file).variants)

    def test_an_index_that_cannot_be_written(self, hub, file, monkeypatch):
        def refuse(path, data):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("zoo_compress.sharing.ship.write_atomic", refuse)
        with pytest.raises(CompressError, match=r"cannot write the index \(Permission denied\), though .* is on the Hub as me/"):
            publish("me", file=file, log=lambda line: None)

    def test_what_the_index_does_not_mean_is_not_pushed(self, hub, file):
        weights = file.parent / "checkpoints" / HALF
        shutil.copyfile(index.find("test_byobnet__pruned.fmnist_half").folder / "model.safetensors", weights / "model.safetensors")
        with pytest.raises(CompressError, match="not the file that config"):
            publish("me", file=file, log=lambda line: None)
        assert f"me/{HALF}" not in hub.repos

    def test_by_name_from_the_hub(self, hub, file, monkeypatch):
        """An entry that only the Hub has: timm's name leads there."""
        from zoo_compress.plugin import registry

        publish("me", file=file, log=lambda line: None)
        entries = tuple(entry.model_copy(update={"checkpoint": None}) for entry in index.read(file).variants)
        (entry,) = (entry for entry in entries if entry.name == HALF)
        cfg = registry._with_weights(timm.get_pretrained_cfg("test_resnet__pruned"), entry)
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, HALF, cfg)
        hub.log.clear()
        model = timm.create_model(HALF, pretrained=True)
        assert model.num_classes == 10
        assert any(f"me/{HALF}/resolve/main/model.safetensors" in path for _, path, _ in hub.log)

    def test_a_recipe_that_was_not_run(self, hub, file, tmp_path):
        content = json.loads(file.read_text())
        content["variants"] = [{key: value for key, value in entry.items() if key != "checkpoint"} for entry in content["variants"]]
        file.write_text(json.dumps(content))
        with pytest.raises(CompressError, match=r"found none; zoo-compress run recipes/quickstart\.yaml"):
            publish("me", file=file, runs=tmp_path / "runs", log=lambda line: None)
        assert hub.repos == {}

    @pytest.fixture
    def runs(self, file, tmp_path):
        """Runs of a recipe with seeds 0 and 1, of which the index means the second; the first made other weights."""
        source = index.find(HALF).folder
        file.write_text(index.dump(index.Index(variants=(index.find(HALF).model_copy(update={"checkpoint": None}),))))
        for seed in (0, 1):
            made = tmp_path / f"runs/quickstart_seed{seed}"
            shutil.copytree(source, made / "model", ignore=shutil.ignore_patterns("results.json"))
            record = read_record(source)
            write_record(made, record.model_copy(update={"seed": seed, "recipe": {**record.recipe, "seed": seed}}))
        other = index.find("test_byobnet__pruned.fmnist_half").folder
        shutil.copyfile(other / "model.safetensors", tmp_path / "runs/quickstart_seed0/model/model.safetensors")
        return tmp_path / "runs"

    def test_of_runs_with_several_seeds_the_one_that_the_index_means(self, hub, file, runs):
        publish("me", file=file, runs=runs, log=lambda line: None)
        assert hub.repos.keys() == {f"me/{HALF}"}
        assert "seeds 1, 0. The table is of the run with seed 1" in (runs / "quickstart_seed1/model/README.md").read_text()

    def test_weights_that_another_processor_made_are_shipped_before_they_are_published(self, hub, file, runs, tmp_path):
        shutil.rmtree(runs / "quickstart_seed1")
        other = index.find("test_resnet__pruned.fmnist_oneshot").folder
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(other / name, runs / "quickstart_seed0/model" / name)
        with pytest.raises(CompressError, match=rf"found .* in .*seed0; .* zoo-compress ship .*seed0 {HALF} quickstart\.yaml") as refused:
            publish("me", file=file, runs=runs, log=lambda line: None)
        assert hub.repos == {}
        command = re.search(r"zoo-compress (ship .*\.yaml)", str(refused.value))[1].split()
        invoke(*command, "--index", file, "--cards", tmp_path / "cards")
        assert [pushed.changed for pushed in publish("me", file=file, runs=runs, log=lambda line: None)] == [True]

    def test_command(self, hub, file):
        output = invoke("publish", "--owner", "me", "--index", file).output
        assert f"{HALF}: hf-hub:me/{HALF}, pushed" in output


class TestShip:
    @pytest.fixture
    def made(self, tmp_path):
        """A run's output folder, as the shipped zoo remembers it."""
        out = tmp_path / "out"
        source = index.find(HALF).folder
        shutil.copytree(source, out / "model", ignore=shutil.ignore_patterns("results.json"))
        shutil.copyfile(source / "results.json", out / "results.json")
        return out

    def test_adds_what_the_shipped_index_has(self, made, tmp_path):
        (tmp_path / "zoo").mkdir()
        file = tmp_path / "zoo/index.json"
        file.write_text('{"variants": []}')
        invoke("ship", made, HALF, "quickstart.yaml", "--cards", tmp_path / "cards", "--index", file)
        assert index.read(file).variants == (index.find(HALF),)
        for path in index.find(HALF).folder.iterdir():
            assert (tmp_path / "zoo/checkpoints" / HALF / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / f"cards/{HALF}.md").read_text() == (ROOT / f"model_cards/{HALF}.md").read_text()
        ship(made, HALF, "quickstart.yaml", cards=tmp_path / "cards", file=file)
        assert len(index.read(file).variants) == 1

    def test_where_training_itself_compresses_the_base_is_what_was_trained_without(self, tmp_path):
        """The first row is of the binary network: its accuracy is not that of what it was made of."""
        name = "test_resnet__binary.fmnist"
        source = index.find(name).folder
        shutil.copytree(source, tmp_path / "out/model", ignore=shutil.ignore_patterns("results.json"))
        shutil.copyfile(source / "results.json", tmp_path / "out/results.json")
        (tmp_path / "index.json").write_text('{"variants": []}')
        entry = ship(tmp_path / "out", name, "bits/fmnist_binary.yaml", cards=tmp_path / "cards", file=tmp_path / "index.json")
        base = timm.create_model("test_resnet", num_classes=10, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 28, 28)})
        layout = zc.analyze(base)
        assert (entry.base_top1, entry.base_macs, entry.base_params) == (91.15, layout.macs(), layout.num_params())
        text = (tmp_path / f"cards/{name}.md").read_text()
        assert f"{layout.macs():,} MACs; trained without compressing it reaches 91.15%" in text
        assert "90.00% (91.15%)" in (tmp_path / "cards/README.md").read_text()
        record = read_record(tmp_path / "out")
        write_record(tmp_path / "out", record.model_copy(update={"baselines": ()}))
        again = {"cards": tmp_path / "others", "file": tmp_path / "index.json"}
        assert ship(tmp_path / "out", name, "bits/fmnist_binary.yaml", **again) == entry.model_copy(update={"base_top1": None})
        assert "90.00% (not measured)" in (tmp_path / "others/README.md").read_text()
        text = (tmp_path / f"others/{name}.md").read_text()
        assert f"{layout.macs():,} MACs; how it does when it is trained without compressing was not measured" in text

    def test_recipes_may_be_in_folders_and_nowhere_else(self, made, tmp_path):
        (tmp_path / "index.json").write_text('{"variants": []}')
        where = {"cards": tmp_path / "cards", "file": tmp_path / "index.json"}
        assert ship(made, HALF, "some/quickstart.yaml", **where).recipe == "some/quickstart.yaml"
        for recipe in ("../quickstart.yaml", "/quickstart.yaml", "some//quickstart.yaml"):
            with pytest.raises(CompressError, match=r"recipe: .* found '.*quickstart\.yaml'"):
                ship(made, HALF, recipe, **where)

    def test_a_run_says_whether_it_made_the_same_weights_again(self, made, tmp_path, monkeypatch):
        recipe = tmp_path / "recipes/quickstart.yaml"
        assert rebuilt(made, recipe) == [f"{HALF}: the same weights as in the zoo, sha256 {index.find(HALF).sha256[:12]}…"]
        assert rebuilt(made, tmp_path / "quickstart.yaml") == []
        (line,) = rebuilt(made, tmp_path / "recipes/test_byobnet_fmnist_half.yaml")
        assert line.startswith("test_byobnet__pruned.fmnist_half: other weights")
        half = index.find(HALF)
        assert line.endswith(f"top-1 {half.top1:.2f}% (zoo 90.81%), {half.macs:,} MACs (zoo 522,016)")
        recipe.parent.mkdir()
        shutil.copyfile(ROOT / "recipes/quickstart.yaml", recipe)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        made.rename("runs/quickstart")
        assert f"{HALF}: the same weights as in the zoo" in invoke("run", "recipes/quickstart.yaml").output
        shutil.copyfile(
            index.find("test_byobnet__pruned.fmnist_half").folder / "model.safetensors", "runs/quickstart/model/model.safetensors"
        )
        assert f"{HALF}: other weights than in the zoo" in invoke("run", "recipes/quickstart.yaml").output

    def test_other_seeds_stay_on_the_card_wherever_it_is_written(self, made, tmp_path):
        """The package has their records, so that a pulled card says what the shipped one does."""
        record = read_record(made)
        rows = tuple(row.model_copy(update={"top1": row.top1 - 1}) for row in record.table)
        (tmp_path / "other").mkdir()
        write_record(tmp_path / "other", record.model_copy(update={"seed": 7, "table": rows}))
        (tmp_path / "zoo").mkdir()
        file = tmp_path / "zoo/index.json"
        file.write_text('{"variants": []}')
        where = {"cards": tmp_path / "cards", "file": file}
        entry = ship(made, HALF, "quickstart.yaml", seeds=[tmp_path / "other"], **where)
        folder = tmp_path / "zoo/checkpoints" / HALF
        packaged(entry, tmp_path / "cards", source=folder)
        spread = f"({record.table[-1].top1 - 0.5:.2f} ± 0.71)"
        assert spread in (tmp_path / f"cards/{HALF}.md").read_text()
        assert (tmp_path / f"cards/{HALF}.md").read_text() == (tmp_path / "cards/README.md").read_text().replace(
            "widths.png", f"{HALF}.png"
        )
        ship(made, HALF, "quickstart.yaml", **where)
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "results.json"]

    def test_a_checkpoint_that_cannot_be_replaced_stays(self, made, tmp_path, monkeypatch):
        (tmp_path / "zoo").mkdir()
        (tmp_path / "zoo/index.json").write_text('{"variants": []}')
        where = {"cards": tmp_path / "cards", "file": tmp_path / "zoo/index.json"}
        ship(made, HALF, "quickstart.yaml", **where)
        folder = tmp_path / "zoo/checkpoints" / HALF
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def full(path, data):
            raise OSError("no space left")

        monkeypatch.setattr("zoo_compress.sharing.ship.write_atomic", full)
        with pytest.raises(OSError, match="no space left"):
            ship(made, HALF, "quickstart.yaml", **where)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_ordinary_models_are_not_variants(self, made, tmp_path):
        zc.save(timm.create_model("test_resnet"), made / "model")
        with pytest.raises(CompressError, match="expected a run that made a compressed model, found an ordinary ResNet"):
            ship(made, HALF, "quickstart.yaml", cards=tmp_path / "cards", file=index.INDEX)

    def test_another_name(self, made, tmp_path):
        with pytest.raises(CompressError, match=r"expected test_resnet__pruned\.TAG"):
            ship(made, "resnet18__pruned.half", "quickstart.yaml", cards=tmp_path / "cards", file=index.INDEX)


def test_push_of_a_run_writes_its_card(hub, tmp_path):
    out = tmp_path / "out"
    source = index.find(HALF).folder
    shutil.copytree(source, out / "model", ignore=shutil.ignore_patterns("results.json"))
    shutil.copyfile(source / "results.json", out / "results.json")
    assert "hf-hub:me/half@v1: commit " in invoke("push", out, "me/half", "--tag", "v1").output
    assert "nothing changed" in invoke("push", out, "me/half", "--tag", "v1").output
    assert {"config.json", "model.safetensors", "README.md", "widths.png"} <= hub.files("me/half").keys()
    assert "the card's numbers hold" in invoke("verify", "hf-hub:me/half@v1").output
    assert invoke("card", out).output.strip() == str(out / "model/README.md")
