"""The record: written whole, read back, and never mistaken for another file."""

import pytest

from zoo_compress.errors import RecipeError
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
