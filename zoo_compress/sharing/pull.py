"""From a name to a folder with the checkpoint and its card, wherever it is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models._hub import hf_split

from ..errors import CompressError
from ..plugin.hub import load
from ..plugin.remote import CONFIG, hub_errors
from ..plugin.weights import WEIGHTS, downloaded
from ..training.checkpoint import check_empty, scratch_beside
from ..zoo import index
from . import card
from .push import model_folder


def pull(name: str, directory: str | Path) -> Path:
    """Fetch a variant: config.json, model.safetensors, and README.md where there is one.

    Args:
        name: A name of the index, `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hub (with or without `hf-hub:`).
        directory: New or empty. It appears whole or not at all.

    Returns:
        The directory.

    Raises:
        CompressError: There is no such variant, the Hub does not give it, it is damaged, or the directory holds files.
    """
    directory = Path(directory)
    check_empty(directory)
    with scratch_beside(directory) as scratch:
        folder = scratch / "folder"
        folder.mkdir()
        _fetch(name, folder)
        load(folder)
        try:
            if directory.exists():
                directory.rmdir()
            folder.rename(directory)
        except OSError as error:
            # Somebody else has put something there meanwhile.
            raise CompressError(f"{directory}: expected a new or empty folder, cannot write it: {error.strerror}") from error
    return directory


@contextmanager
def located(name: str) -> Iterator[Path]:
    """The folder a name or a path means, with its card; of what has to be fetched, one that is gone afterwards."""
    if Path(name).is_dir():
        yield model_folder(name)
        return
    with tempfile.TemporaryDirectory(prefix="zoo_compress-pull-") as scratch:
        yield pull(name, Path(scratch, "model"))


def packaged(entry: index.Entry, folder: Path, name: str | None = None, source: Path | None = None) -> None:
    """Write a shipped checkpoint with its card into a folder.

    Args:
        entry: A variant whose weights are shipped.
        folder: An empty one.
        name: What the card's snippet loads; the entry's name unless given.
        source: Where the checkpoint and the records of its run and of other seeds are; in this package unless given.
    """
    source = source or entry.folder
    assert source is not None
    for file in (CONFIG, WEIGHTS):
        shutil.copyfile(source / file, folder / file)
    record = card.finished(source)
    seeds = card.of_seeds(record, list(source.glob(f"{card.SEED}*")))
    subject = card.Subject(load(folder), folder, name or entry.name, record, seeds)
    picture = card.draw(subject, folder)
    (folder / card.README).write_text(card.render(subject, picture), encoding="utf-8")


def _fetch(name: str, folder: Path) -> None:
    entry = index.find(name)
    if entry is not None and entry.checkpoint:
        return packaged(entry, folder)
    if entry is not None and not entry.hub_id:
        raise CompressError(f"{name}: its weights are not published; its recipe makes them: zoo-compress run recipes/{entry.recipe}")
    hub_id = entry.hub_id if entry and entry.hub_id else name.removeprefix("hf-hub:")
    if "/" not in hub_id:
        raise CompressError(f"{name}: expected a name of zoo_compress.list_variants(), OWNER/NAME on the Hub or a folder")
    if hub_id.count("@") > 1:
        raise CompressError(f"{name}: expected OWNER/NAME or OWNER/NAME@REVISION")
    repo_id, revision = hf_split(hub_id)
    cached = {}
    for file in (CONFIG, WEIGHTS, card.README, card.PICTURE):
        with hub_errors(hub_id, file):
            try:
                cached[file] = Path(hf_hub_download(repo_id, file, revision=revision, library_name="zoo_compress"))
            except EntryNotFoundError:
                if file in (CONFIG, WEIGHTS):
                    raise
    with hub_errors(hub_id):
        downloaded(hub_id, cached[CONFIG], cached[WEIGHTS])
        for file, path in cached.items():
            shutil.copyfile(path, folder / file)
