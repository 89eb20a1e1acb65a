"""Pictures by matplotlib (extra `plots`): figures that no window shows, and what can go wrong with their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import CompressError


def blank_figure(size: tuple[float, float]) -> Any:
    """A matplotlib figure of so many inches.

    Raises:
        CompressError: Matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("pictures need matplotlib: pip install 'zoo_compress[plots]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_figure(path: str | Path) -> None:
    """Find out, before the work that it is to show, whether a picture can be written.

    Raises:
        CompressError: Matplotlib is missing, or writes no such files, or the folder does not exist.
    """
    kinds, path = blank_figure((1, 1)).canvas.get_supported_filetypes(), Path(path)
    if path.suffix.lstrip(".").lower() not in kinds:
        raise CompressError(f"{path}: expected an image file that matplotlib writes ({', '.join(sorted(kinds))}), found {path.suffix!r}")
    if not path.parent.is_dir():
        raise CompressError(f"{path}: expected an existing folder, found none at {path.parent}")


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Write a figure; the same one gives the same file, whenever it is drawn.

    Args:
        figure: From `blank_figure`.
        path: Image file; its ending says which kind.
        **options: As for `Figure.savefig`.

    Raises:
        CompressError: It cannot be written.
    """
    check_figure(path)
    import matplotlib

    # PNG files would have the version of matplotlib, others the time or random names.
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(path).suffix.lower())
    try:
        with matplotlib.rc_context({"svg.hashsalt": "zoo_compress"}):
            figure.savefig(path, metadata=metadata, **options)
    except OSError as error:
        raise CompressError(f"{path}: cannot write the picture: {error.strerror or error}") from error
