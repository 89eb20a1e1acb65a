"""The record: written whole, read back, and never mistaken for another file."""

import json
import re
import shutil
from pathlib import Path

import pytest

from zoo_compress.errors import CompressError, RecipeError
from zoo_compress.record import (
    RECORD_NAME,
    Epoch,
    Record,
    Row,
    StepRecord,
    format_table,
    machine,
    read_record,
    versions,
    write_record,
)
from zoo_compress.runner import run
from zoo_compress.sharing import card
from zoo_compress.zoo import index

ROOT = Path(__file__).parent.parent

EPOCH = Epoch(train_loss=0.1, lr=1e-3, loss=float("inf"), top1=50.0, top5=100.0, seconds=1.5)


def record(**changes):
    values = {
        "recipe": {"output": "x"},
        "recipe_sha256": "0" * 64,
        "seed": 0,
        "world_size": 1,
        "versions": versions(),
        "machine": machine(1, "cpu"),
        "started": "2020-01-01T00:00:00+00:00",
    }
    return Record(**{**values, **changes})


def row(label, macs=100, **changes):
    values = {"params": 1234567, "top1": 90.5, "latency_ms": 1.5, "latency_iqr_ms": 0.2, "batch_size": 1, "threads": 2}
    values |= {"weight_memory": 4000, "activation_memory": 1000}
    return Row(label=label, macs=macs, **{**values, **changes})


def test_round_trip(tmp_path):
    done = StepRecord(
        name="01_train", kind="train", checkpoint="steps/01_train", metrics={"loss": float("inf")}, epochs=(EPOCH,), seconds=1.0
    )
    written = record().extended(done, table=(row("model"),), status="finished")
    write_record(tmp_path, written)
    assert read_record(tmp_path) == written
    assert written.step("01_train") == done


def test_no_record(tmp_path):
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', "not json", "\udcff"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / RECORD_NAME).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError) as error:
        read_record(tmp_path)
    assert RECORD_NAME in str(error.value)
    assert "\n" not in str(error.value)


def test_table_is_aligned():
    lines = format_table([row("before pruning"), row("after", macs=50, latency_ms=123.456)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "1,234,567" in lines[1]
    assert "90.50%" in lines[1]
    assert "50 (50.0%)" in lines[2]
    assert "123.46 ± 0.10" in lines[2]
    assert "batch 1, 2 threads" in lines[0]


class TestTampered:
    """Anyone may have written a record: one that points outside its folder, or says what none of ours says, is refused."""

    @pytest.fixture
    def made(self, tmp_path):
        """A finished run's output folder."""
        out = tmp_path / "runs/out"
        source = index.find("test_resnet__pruned.digits_half").folder
        shutil.copytree(source, out / "model", ignore=shutil.ignore_patterns("results.json"))
        shutil.copyfile(source / "results.json", out / "results.json")
        return out

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("steps.0.name", "../../victim", "steps.0.name: String should match pattern"),
            ("steps.0.name", "/victim", "steps.0.name: String should match pattern"),
            ("steps.1.checkpoint", "steps/../../victim", "expected the checkpoint steps/01_train or none"),
            ("steps.0.checkpoint", None, "expected a first step that made a model"),
            ("steps.5.metrics.to", "../other", "expected a folder below the output folder"),
            ("steps.5.metrics.to", "/other", "expected a folder below the output folder"),
            ("steps.5.metrics.to", None, "Input should be a valid string"),
            ("table.0.macs", 0, "table.0.macs: Input should be greater than or equal to 1"),
            ("machine.threads", "x", "expected a number of threads, found 'x'"),
            ("recipe.newer", 1, "newer: expected no such key"),
            ("recipe.data", {}, "data.source: expected a value, found none"),
            ("recipe.model", "x", "model: expected"),
            ("recipe.stages", [], "stages: expected"),
            ("recipe.stages", 5, "expected stages, each with its kind and settings"),
            ("recipe.stages.0", {}, "expected stages, each with its kind and settings"),
            ("recipe", {}, "expected stages, each with its kind and settings"),
        ],
    )
    def test_is_refused_in_one_line(self, made, key, value, message):
        content = json.loads((made / "results.json").read_text())
        *path, last = (int(part) if part.isdigit() else part for part in key.split("."))
        inner = content
        for part in path:
            inner = inner[part]
        inner[last] = value
        (made / "results.json").write_text(json.dumps(content))
        before = sorted(made.parent.parent.rglob("*"))
        with pytest.raises(CompressError, match=re.escape(message)) as caught:
            card.write(made)
        assert str(made / "results.json") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert sorted(made.parent.parent.rglob("*")) == before

    def test_steps_of_another_recipe_are_not_gone_on_from(self, made, tmp_path):
        """What a run clears away is named in its record."""
        content = json.loads((made / "results.json").read_text())
        content["status"], content["steps"] = "running", [{**content["steps"][0], "name": "07_create", "checkpoint": "steps/07_create"}]
        (made / "results.json").write_text(json.dumps(content))
        (tmp_path / "quickstart.yaml").write_text((ROOT / "recipes/quickstart.yaml").read_text().replace("runs/quickstart", str(made)))
        with pytest.raises(RecipeError, match=r"expected the steps of its recipe, found 07_create; use --fresh to start over"):
            run(tmp_path / "quickstart.yaml")
