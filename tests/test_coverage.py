"""The table over timm's registry: what a row says, that a run goes on where it stopped, and that one architecture costs its row only."""

import csv
import dataclasses
import os
import re
import signal
import time

import pytest
import timm
import torch
from click.testing import CliRunner

import zoo_compress as zc
from zoo_compress import coverage
from zoo_compress.cli import cli
from zoo_compress.coverage import CoverageRow, architectures, cover, macs_error, summary, survey


def rows_of(path):
    with open(path, newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_a_row_says_what_the_layout_says():
    row = survey("test_resnet")
    layout = zc.analyze(timm.create_model("test_resnet"))
    assert (row.status, row.reason) == ("ok", "")
    assert (row.params, row.macs, row.axes, row.free) == (layout.num_params(), layout.macs(), len(layout.axes), len(layout.free))
    assert row.frozen == {"image channels": 1, "model output (class logits)": 1}
    assert row.macs_error == 0
    assert 0 < row.reachable < 0.1
    assert 0.9 < row.free_share < 1
    assert row.permutation_error is None


def test_no_weights_are_allocated():
    layout = survey("vit_huge_patch14_224")
    assert layout.params > 600e6
    assert layout.peak_mb < 500


def test_macs_at_random_widths_are_compared_with_a_count():
    with torch.device("meta"):
        model = timm.create_model("test_vit").eval()
    layout = zc.analyze(model)
    assert macs_error(model, layout) == 0
    broken = dataclasses.replace(layout, macs_terms=layout.macs_terms[1:])
    assert macs_error(model, broken) > 1e-3


def test_only_timms_own_architectures():
    assert architectures() == timm.list_models(exclude_filters="*__*")
    assert architectures(["test_vit", "test_vit?"]) == ["test_vit", "test_vit2", "test_vit3", "test_vit4"]
    with pytest.raises(zc.CompressError, match="'resnet8' matches no architecture"):
        architectures(["resnet8"])


def test_command_writes_a_table_and_goes_on(tmp_path):
    out = tmp_path / "coverage.csv"
    run = CliRunner().invoke(cli, ["coverage", "test_resnet", "-o", str(out)])
    assert run.exit_code == 0, run.output
    assert "| ok | 1 |" in run.output
    first = rows_of(out)["test_resnet"]
    assert float(first["permutation_error"]) < 1e-6

    run = CliRunner().invoke(cli, ["coverage", "test_resnet", "test_convnext", "-o", str(out), "--proof-below", "0"])
    assert run.exit_code == 0, run.output
    assert rows_of(out)["test_resnet"] == first, "a row that was there was made again"
    assert rows_of(out)["test_convnext"]["permutation_error"] == ""

    cover(["test_convnext"], out, proof_below=10**9)
    assert float(rows_of(out)["test_convnext"]["permutation_error"]) < 1e-6


def test_command_wants_names():
    run = CliRunner().invoke(cli, ["coverage"])
    assert run.exit_code == 2
    assert "expected names or globs" in run.output


def test_another_file_is_refused(tmp_path):
    other = tmp_path / "coverage.csv"
    other.write_text("name,price\napple,1\n")
    with pytest.raises(zc.CompressError, match="expected a table that coverage wrote"):
        cover(["test_resnet"], other)
    assert other.read_text() == "name,price\napple,1\n"


def crash(name):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(name):
    time.sleep(60)


def greedy(name):
    return torch.ones(2**31).sum()


def refuse(name):
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    ("work", "reason"),
    [(crash, "exit code -9"), (hang, "took longer than 2 s"), (greedy, "RuntimeError: .*memory"), (refuse, "RuntimeError: no such luck")],
)
def test_an_architecture_costs_its_own_row_only(work, reason, tmp_path, monkeypatch):
    good = coverage.survey
    monkeypatch.setattr(coverage, "survey", lambda name: work(name) if name == "test_vit" else good(name))
    bad, fine = cover(["test_vit", "test_resnet"], tmp_path / "coverage.csv", time_limit=2, memory_limit=4)
    assert (bad.status, fine.status) == ("failed", "ok")
    assert re.search(reason, bad.reason), bad.reason
    monkeypatch.setattr(coverage, "survey", good)
    assert cover(["test_vit"], tmp_path / "coverage.csv")[0].status == "failed"
    assert cover(["test_vit"], tmp_path / "coverage.csv", retry=True)[0].status == "ok"


def test_a_wrong_layout_is_reported(tmp_path, monkeypatch):
    def refuted(model, layout, example_input):
        raise zc.VerificationError("permutation proof: permuting axis 'c0' changes the output")

    monkeypatch.setattr(coverage, "prove_permutation", refuted)
    run = CliRunner().invoke(cli, ["coverage", "test_resnet", "-o", str(tmp_path / "coverage.csv")])
    assert run.exit_code == 2
    assert "the layout is wrong of test_resnet" in run.output
    assert rows_of(tmp_path / "coverage.csv")["test_resnet"]["status"] == "wrong"


@pytest.mark.parametrize(("name", "side"), [("resnet18", 128), ("vit_tiny_patch16_224", 224)])
def test_proofs_run_on_small_images_where_the_layout_is_the_same(name, side):
    model = timm.create_model(name).eval()
    assert coverage._proof_input(model, zc.analyze(model)).shape == (2, 3, side, side)


def test_summary_counts_and_names_the_worst():
    rows = [
        CoverageRow(name="a", seconds=1, free_share=0.9, frozen={"image channels": 1}),
        CoverageRow(name="b", seconds=3, free_share=1.0, frozen={"image channels": 2}),
        CoverageRow(name="c", status="failed", reason="RuntimeError: no"),
    ]
    text = summary(rows)
    assert "| architectures | 3 |" in text
    assert "median 2.00, worst 3.00 (b)" in text
    assert "worst 0.9000 (a)" in text
    assert "| failed: RuntimeError: no | 1 |" in text
    assert "| image channels | 2 |" in text
