"""Pictures: what cannot be written is said before the work that they are to show; the same figure gives the same file."""

import os

import pytest
from click.testing import CliRunner

from zoo_compress import lottery
from zoo_compress.cli import cli
from zoo_compress.errors import CompressError
from zoo_compress.figures import blank_figure, check_figure, save_figure

pytest.importorskip("matplotlib", reason="the extra `plots`")


def drawn():
    figure = blank_figure((2, 1))
    figure.add_subplot().plot([1, 2])
    return figure


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_figure_is_the_same_file(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    save_figure(drawn(), tmp_path / f"a.{kind}")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    save_figure(drawn(), tmp_path / f"b.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize(
    ("name", "said"), [("a.docx", "expected an image file that matplotlib writes"), ("no/a.png", "expected an existing")]
)
def test_what_cannot_be_written(tmp_path, name, said):
    with pytest.raises(CompressError, match=said):
        check_figure(tmp_path / name)
    with pytest.raises(CompressError, match=said):
        save_figure(drawn(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(CompressError, match="cannot write the picture"):
        save_figure(drawn(), tmp_path / "a.png")


def test_studies_find_out_before_they_train(tmp_path, monkeypatch):
    """Hours of training ended in a traceback where the picture could not be drawn."""
    monkeypatch.setattr(lottery, "lottery", lambda *args: pytest.fail("it trains"))
    result = CliRunner().invoke(cli, ["lottery", "recipe.yaml", "--plot", str(tmp_path / "curves.nothing")])
    assert result.exit_code == 2
    assert "expected an image file that matplotlib writes" in result.output
