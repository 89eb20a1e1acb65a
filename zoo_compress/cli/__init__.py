"""The command line. Each command is a thin adapter over one public function; heavy imports wait until a command runs."""

from collections.abc import Sequence

from . import exits, factors, models, runs, weights, zoo  # noqa: F401  (commands register themselves)
from .common import cli, load_model

__all__ = ["cli", "load_model", "main"]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `zoo-compress`."""
    cli(args=list(args) if args is not None else None, prog_name="zoo-compress")
