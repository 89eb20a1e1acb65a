"""The shipped zoo: adding a run's result to the index, and publishing all of it on the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ..errors import CompressError
from ..plugin.hub import load
from ..plugin.remote import CONFIG
from ..plugin.weights import WEIGHTS, digest
from ..record import RECORD_NAME, Record, Row, read_record, write_record
from ..surgery.origin import variant_of
from ..training.checkpoint import made, whole_folder, write_atomic
from ..zoo import index
from . import card
from .front_matter import dataset
from .pull import packaged
from .push import Pushed, push_to_hub

LARGEST = 1_000_000
"""Bytes of weights that are shipped with the package; of others the recipe is."""


def ship(
    directory: str | Path,
    name: str,
    recipe: str,
    *,
    seeds: Sequence[str | Path] = (),
    cards: str | Path = "model_cards",
    file: str | Path = index.INDEX,
) -> index.Entry:
    """Add the result of a finished run to the zoo: to the index, its card to a folder of cards, small weights to the package.

    Args:
        directory: Output folder of the run.
        name: `<base>__<method>.<tag>`.
        recipe: File in `recipes/` that makes it.
        seeds: Output folders of runs of the same recipe with other seeds, for the spread on the card.
        cards: Folder of cards; its README.md, the table over all of them, is written anew.
        file: The index; checkpoints go to `checkpoints/` beside it. An entry of that name is replaced.

    Raises:
        CompressError: There is no finished run, it made something else than the name says, or the index cannot hold that.
    """
    directory, file, cards = Path(directory), Path(file), Path(cards)
    record = card.finished(directory)
    folder = card.saved_folder(directory)
    if folder is None:
        raise CompressError(f"{directory}: expected a run that saved a model, found no save stage in its record")
    model = load(folder)
    variant = variant_of(model)
    if variant is None:
        raise CompressError(f"{directory}: expected a run that made a compressed model, found an ordinary {type(model).__name__}")
    if name.partition(".")[0] != variant.architecture:
        raise CompressError(f"{name}: expected {variant.architecture}.TAG, the name of what {directory} made")
    others = card.of_seeds(record, seeds)
    entry = _entry(record, model, folder, name, recipe)
    listing = index.read(file)
    if entry.checkpoint:
        with whole_folder(file.parent / "checkpoints" / entry.checkpoint) as target:
            for source in (folder / WEIGHTS, folder / CONFIG, directory / RECORD_NAME):
                write_atomic(target / source.name, source.read_bytes())
            for other in others:
                beside = target / f"{card.SEED}{other.seed}"
                beside.mkdir()
                write_record(beside, other)
    made(cards)
    subject = card.Subject(model, folder, name if entry.checkpoint else card.HERE, record, others)
    picture = card.draw(subject, cards, f"{name}.png")
    write_atomic(cards / f"{name}.md", card.render(subject, picture).encode())
    variants = (*(other for other in listing.variants if other.name != name), entry)
    listing = index.Index(variants=tuple(sorted(variants, key=lambda entry: entry.name)))
    write_atomic(file, index.dump(listing).encode())
    write_atomic(cards / card.README, cards_table(listing).encode())
    return entry


def rebuilt(directory: str | Path, recipe: str | Path, file: str | Path = index.INDEX) -> list[str]:
    """Whether a finished run made what the index says its recipe makes.

    Args:
        directory: Output folder of the run.
        recipe: Path of the recipe; the index knows those of folders named `recipes`.
        file: The index.

    Returns:
        A line for each variant that the index has of this recipe. Other weights are no error: processors and versions round differently,
        and of a network that was trained only statistics come out alike. Then both accuracies and MACs are said.
    """
    name = Path(recipe).absolute().as_posix().rpartition("/recipes/")[2]
    folder = card.saved_folder(Path(directory))
    entries = [entry for entry in index.read(Path(file)).variants if entry.recipe == name]
    if folder is None or not entries:
        return []
    found, row = digest(folder / WEIGHTS), card.finished(Path(directory)).table[-1]
    same = f"the same weights as in the zoo, sha256 {found[:12]}…"
    return [f"{entry.name}: {same if entry.sha256 == found else _difference(entry, found, row)}" for entry in entries]


def _difference(entry: index.Entry, found: str, row: Row) -> str:
    return (
        f"other weights than in the zoo (expected sha256 {entry.sha256[:12]}…, found {found[:12]}…): another processor, version or set of "
        f"images gives others; top-1 {row.top1:.2f}% (zoo {entry.top1:.2f}%), {row.macs:,} MACs (zoo {entry.macs:,})"
    )


def _entry(record: Record, model: nn.Module, folder: Path, name: str, recipe: str) -> index.Entry:
    last: Row = record.table[-1]
    size = (folder / WEIGHTS).stat().st_size
    data = record.recipe["data"]
    assert isinstance(data, dict)
    return index.entry(
        name=name,
        dataset=dataset(str(data["source"])),
        top1=round(last.top1, 4),
        macs=last.macs,
        params=last.params,
        size=size,
        sha256=digest(folder / WEIGHTS),
        **_base(record, model),
        recipe=recipe,
        checkpoint=name if size < LARGEST else None,
    )


def _base(record: Record, model: nn.Module) -> dict[str, float | int | None]:
    """What the index says of the model that a run compressed."""
    first = card.before(record)
    if first is not None:
        return {"base_top1": round(first.top1, 4), "base_macs": first.macs, "base_params": first.params}
    base = card.start_layout(record, model)
    whole = card.whole_baseline(record, model, base)
    return {"base_top1": round(whole.top1, 4) if whole else None, "base_macs": base.macs(), "base_params": base.num_params()}


def cards_table(listing: index.Index) -> str:
    """The index of the cards, as Markdown."""
    lines = [
        "# Model cards",
        "",
        "Written by `zoo-compress ship` from the records of runs; not edited.",
        "",
        "| variant | made of | data | top-1 (base) | MACs (base) | parameters (base) | weights, bytes | where |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in listing.variants:
        where = "in the package" if entry.checkpoint else f"`hf-hub:{entry.hub_id}`" if entry.hub_id else "its recipe makes it"
        base = "not measured" if entry.base_top1 is None else f"{entry.base_top1:.2f}%"
        lines.append(
            f"| [{entry.name}]({entry.name}.md) | {entry.base} | {entry.dataset} | {entry.top1:.2f}% ({base}) | "
            f"{entry.macs:,} ({entry.base_macs:,}) | {entry.params:,} ({entry.base_params:,}) | {entry.size:,} | {where} |"
        )
    return "\n".join(lines) + "\n"


def publish(
    owner: str,
    *,
    file: str | Path = index.INDEX,
    runs: str | Path = "runs",
    tag: str | None = None,
    private: bool = False,
    token: str | None = None,
    log: Callable[[str], None] = print,
) -> list[Pushed]:
    """Push every variant of the index to the Hub under one owner's name, and write the Hub's ids into the index.

    Variants are pushed one after the other, and the index is written after each: stop it however you like, the same call goes on. What is
    there already, with equal content, is not pushed again.

    Args:
        owner: User or organisation.
        file: The index to read and to write.
        runs: Where the recipes' output folders are, for variants whose weights are not shipped.
        tag: A name for this version.
        private: Whether only the owner sees them.
        token: See `push_to_hub`.
        log: Takes a line for each variant.

    Raises:
        CompressError: At the end, if variants could not be pushed, with the reason of each.
    """
    listing, done, failed = index.read(Path(file)), [], []
    for entry in listing.variants:
        repo_id = f"{owner}/{index.repo_name(entry)}"
        try:
            with tempfile.TemporaryDirectory(prefix="zoo_compress-publish-") as scratch:
                _collect(entry, Path(file).parent, Path(runs), Path(scratch), f"hf-hub:{repo_id}")
                pushed = push_to_hub(scratch, repo_id, tag=tag, private=private, token=token, commit_message=f"Add {entry.name}")
        except CompressError as error:
            failed.append(f"{entry.name}: {error}")
            log(f"{entry.name}: {error}")
            continue
        done.append(pushed)
        hub_id = f"{repo_id}@{tag}" if tag else repo_id
        variants = tuple(entry.model_copy(update={"hub_id": hub_id}) if other.name == entry.name else other for other in listing.variants)
        listing = listing.model_copy(update={"variants": variants})
        try:
            write_atomic(Path(file), index.dump(listing).encode())
        except OSError as error:
            raise CompressError(
                f"{file}: cannot write the index ({error.strerror}), though {entry.name} is on the Hub as {hub_id}"
            ) from error
        log(f"{entry.name}: {pushed.name}, {'pushed' if pushed.changed else 'there already'}")
    if failed:
        raise CompressError(f"{len(failed)} of {len(listing.variants)} variants were not published: {'; '.join(failed)}")
    return done


def _collect(entry: index.Entry, zoo: Path, runs: Path, folder: Path, name: str) -> None:
    """A folder to push: checkpoint and card, known to be what the index names."""
    if entry.checkpoint:
        packaged(entry, folder, name, zoo / "checkpoints" / entry.checkpoint)
    else:
        recipe = Path(str(entry.recipe)).stem
        outputs = [path for path in (runs / recipe, *sorted(runs.glob(f"{recipe}_seed*"))) if card.saved_folder(path) is not None]
        if not outputs:
            raise CompressError(f"expected the run of its recipe in {runs / recipe}, found none; zoo-compress run recipes/{entry.recipe}")
        made = {digest(Path(str(card.saved_folder(path))) / WEIGHTS): path for path in outputs}
        if entry.sha256 not in made:
            found = ", ".join(f"{sha256[:12]}… in {path}" for sha256, path in made.items())
            raise CompressError(
                f"expected a run whose weights have sha256 {entry.sha256[:12]}… as in the index, found {found}; another processor gives "
                f"others, which are published once they are in the index: zoo-compress ship {outputs[0]} {entry.name} {entry.recipe}"
            )
        source = made[entry.sha256]
        others = {record.seed: path for path in outputs if (record := read_record(path)) and record.status == "finished"}
        others.pop(card.finished(source).seed)
        for file in card.write(source, list(others.values())).iterdir():
            if file.name in (CONFIG, WEIGHTS, card.README, card.PICTURE):
                shutil.copyfile(file, folder / file.name)
    if (found := digest(folder / WEIGHTS)) != entry.sha256:
        raise CompressError(f"expected weights with sha256 {entry.sha256[:12]}… as in the index, found {found[:12]}…")
