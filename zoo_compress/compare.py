"""Several recipes, each with several seeds, in one table: what methods do to accuracy is said with its spread or not at all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import RecipeError
from .recipe import load_recipe
from .record import Record, aligned
from .runner import run

RELOADED = "reloaded"
"""Label of the row that evaluates the saved model once more: the last one's numbers again."""


@dataclass(frozen=True)
class Line:
    """One model of one recipe, over seeds.

    Attributes:
        recipe: The recipe's file, without its ending.
        label: Which of its models.
        params: Number of parameters, the mean over seeds: pruning by learned weights may choose others with each.
        macs: Multiply-accumulates of one image, likewise.
        top1: Top-1 accuracy on the test images of each seed, in percent.
        file_bytes: Size of its weights' file, the mean over seeds; None where it has none of its own.
    """

    recipe: str
    label: str
    params: float
    macs: float
    top1: tuple[float, ...]
    file_bytes: float | None = None

    @property
    def mean(self) -> float:
        """Mean top-1, in percent."""
        return statistics.mean(self.top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation of top-1 over seeds, in points; None of a single one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def compare(paths: Sequence[str | Path], seeds: Sequence[int], *, log: Callable[[str], None] | None = None) -> list[Line]:
    """Run recipes with seeds, or what is left of that, and put their models side by side.

    A recipe that trains the same model in the same way as one before it, until it is compressed, takes over what that trained.

    Args:
        paths: Recipes.
        seeds: Seeds; each run has an output folder of its own, as `run(path, seed=…)` makes it.
        log: As for `run`.

    Raises:
        RecipeError: A recipe is none, two have one name, or there is no seed.
        CompressError: A run failed.
    """
    check_seeds(seeds)
    found = []
    for place, (name, path) in enumerate(zip(names_of(paths), paths, strict=True)):
        found += lines(name, [run(path, seed=seed, others=outputs(paths[:place], seed), log=log) for seed in seeds])
    return found


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """What to call recipes: their files' names without ending.

    Raises:
        RecipeError: Two are the same.
    """
    names = [Path(path).stem for path in paths]
    if len(set(names)) != len(names):
        raise RecipeError(f"expected recipes with different file names, found {', '.join(sorted(names))}")
    return names


def outputs(paths: Sequence[str | Path], seed: int) -> list[Path]:
    """Output folders of the runs of recipes with a seed."""
    return [Path(load_recipe(path).with_seed(seed).output).expanduser() for path in paths]


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds, and the same one twice.

    Raises:
        RecipeError: That.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise RecipeError(f"seeds: expected one or more different ones, found {', '.join(map(str, seeds)) or 'none'}")


def lines(name: str, records: Sequence[Record]) -> list[Line]:
    """A recipe's table over the records of its seeds.

    Args:
        name: What to call the recipe.
        records: Of finished runs of one recipe.
    """
    tables = [{row.label: row for row in (*record.table, *record.baselines) if row.label != RELOADED} for record in records]
    return [
        Line(
            name,
            label,
            statistics.mean(table[label].params for table in tables),
            statistics.mean(table[label].macs for table in tables),
            tuple(table[label].top1 for table in tables),
            _mean([table[label].file_bytes for table in tables]),
        )
        for label in tables[0]
        if all(label in table for table in tables)
    ]


def _mean(sizes: Sequence[int | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return statistics.mean(known) if known and len(known) == len(sizes) else None


def format_lines(table: Sequence[Line]) -> str:
    """The table for people."""
    count = max((len(line.top1) for line in table), default=1)
    head = ["", "", "parameters", "MACs", "file, bytes", "top-1" if count == 1 else f"top-1 (mean ± standard deviation of {count} seeds)"]
    body = []
    before = ""
    for line in table:
        spread = "" if line.spread is None else f" ± {line.spread:.2f}"
        recipe = line.recipe if line.recipe != before else ""
        size = "–" if line.file_bytes is None else f"{line.file_bytes:,.0f}"
        body.append([recipe, line.label, f"{line.params:,.0f}", f"{line.macs:,.0f}", size, f"{line.mean:.2f}{spread}"])
        before = line.recipe
    return aligned([head, *body], left=2)
