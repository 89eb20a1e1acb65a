"""Publishing a model on the Hugging Face Hub: three files, one commit, nothing when nothing changed."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, RepoFile
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..errors import CompressError, HubError, VariantError
from ..plugin.hub import load, save
from ..plugin.remote import CONFIG, hub_errors, quote
from ..plugin.weights import WEIGHTS
from . import card

README = card.README
_TOKEN = re.compile(r"[!-~]+")
_REF = re.compile(r"(?![-./])(?!.*(\.\.|//|\.lock$|@\{))[\w./+-]{1,200}(?<![./])")
_OID = re.compile(r"[0-9a-f]{5,64}")


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: `OWNER/NAME`.
        commit: Hash of the commit that holds the files now.
        changed: Whether there is a new commit; without, the files were there already.
        tag: The tag that names the commit, if one was asked for.
    """

    repo_id: str
    commit: str
    changed: bool
    tag: str | None = None

    @property
    def name(self) -> str:
        """What `timm.create_model` takes."""
        return f"hf-hub:{self.repo_id}{f'@{self.tag}' if self.tag else ''}"


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> Pushed:
    """Publish a model, so that `timm.create_model("hf-hub:OWNER/NAME@TAG", pretrained=True)` makes it, given `import zoo_compress`.

    config.json, model.safetensors and the model card README.md (with its picture, if it has one) go into one commit. Until that commit
    nothing of them is visible, so a push that fails leaves the branch as it was, and can be repeated. Files that are there already are not
    sent again; if all are, there is no commit. The tag is set afterwards. Nothing else of a directory is ever uploaded.

    Args:
        model: A model that timm's factory made, or a directory that `save` or a recipe wrote. A directory's own README.md is taken; where
            there is none, a card is written from what the model itself knows.
        repo_id: `OWNER/NAME`; made if it does not exist.
        tag: A name for this version, such as `v1`; it must not name another one already.
        private: Whether only the owner sees it.
        token: Of a user who may write there; the one `hf auth login` stored, or HF_TOKEN, unless given.
        commit_message: One line.
        revision: Branch to commit to, if not the main one; it must exist.

    Raises:
        HubError: The Hub refuses: the name belongs to somebody else, the token is expired or only reads, the connection fails.
        CompressError: There is nothing to publish: no safetensors, a damaged checkpoint, a model timm cannot create again, a bad name.
    """
    _check_names(repo_id, tag, revision, token)
    with tempfile.TemporaryDirectory(prefix="zoo_compress-push-") as scratch:
        files = _files(model, Path(scratch), repo_id)
        return _push(files, repo_id, tag, private, token, commit_message or f"{'Tag ' + tag if tag else 'Add model'}", revision)


def _check_names(repo_id: str, tag: str | None, revision: str | None, token: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"repo_id: expected OWNER/NAME, found {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise HubError(f"repo_id: expected OWNER/NAME, found {repo_id!r}")
    for what, name in {"tag": tag, "revision": revision}.items():
        if name is not None and not _REF.fullmatch(name):
            raise HubError(f"{what}: expected a name git admits, such as v1, found {name!r}")
    # A client would put the whole header into its message.
    if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token)):
        raise HubError("token: expected one line of visible ASCII characters, found something else (not shown here)")


def _files(model: nn.Module | str | Path, scratch: Path, repo_id: str) -> dict[str, bytes | Path]:
    """What to upload, checked: name in the repository → where it is."""
    if isinstance(model, nn.Module):
        save(model, scratch)
        return {CONFIG: scratch / CONFIG, WEIGHTS: scratch / WEIGHTS, README: card.plain(model, scratch, repo_id).encode()}
    folder = model_folder(model)
    loaded = load(folder)  # refuses damage, other formats, and what this version cannot make again
    files: dict[str, bytes | Path] = {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
    if not (folder / README).is_file():
        return {**files, README: card.plain(loaded, folder, repo_id).encode()}
    # Where a card was written, nobody knew yet where it would go.
    files[README] = card.at(repo_id, (folder / README).read_text(encoding="utf-8")).encode()
    return {**files, **({card.PICTURE: folder / card.PICTURE} if (folder / card.PICTURE).is_file() else {})}


def model_folder(directory: str | Path) -> Path:
    """The folder of a saved model, given that folder, or the output folder of a recipe that saved one.

    Raises:
        CompressError: There is none, with what was found.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CompressError(
            f"{directory}: expected a folder with {CONFIG} and {WEIGHTS}, found {'a file' if directory.exists() else 'nothing'}"
        )
    if not (directory / CONFIG).is_file() and (saved := card.saved_folder(directory)) is not None:
        directory = saved
    if not (directory / WEIGHTS).is_file():
        found = sorted(path.name for path in directory.iterdir())
        raise VariantError(
            f"{directory}: no safetensors ({WEIGHTS}), found {', '.join(found[:5]) or 'nothing'}; other formats are not published"
        )
    return directory


def _push(
    files: Mapping[str, bytes | Path], repo_id: str, tag: str | None, private: bool, token: str | None, message: str, revision: str | None
) -> Pushed:
    api = HfApi(token=token, library_name="zoo_compress")
    where = f"{repo_id}@{revision}" if revision else repo_id
    with hub_errors(where, token=token), _forbidden(api, repo_id):
        info = _repository(api, repo_id, private, revision)
        head = info.sha or ""
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags} if tag else {}
        unchanged = bool(head) and _same(files, _remote(api, repo_id, revision))
        if tag in tags and not (unchanged and tags[tag] == head):
            raise HubError(f"{repo_id}: the tag {tag!r} already names commit {tags[tag][:12]}; choose another tag")
        if not unchanged:
            # `parent_commit`: if somebody pushes between the question above and this commit, the Hub refuses.
            parent = head if _OID.fullmatch(head) else None
            operations = [CommitOperationAdd(name, source) for name, source in files.items()]
            commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=parent)
            head, unchanged = commit.oid, commit.oid == head
    if tag is not None and tag not in tags:
        try:
            with hub_errors(where, token=token):
                api.create_tag(repo_id, tag=tag, revision=head)
        except HubError as error:
            raise HubError(f"{error}. It is committed as {head[:12]}, but the tag {tag!r} was not set; push again to set it") from error
    return Pushed(repo_id, head, not unchanged, tag)


@contextmanager
def _forbidden(api: HfApi, repo_id: str) -> Iterator[None]:
    """Say which of the two reasons it was that the Hub forbids to write."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code != 403:
            raise
        try:
            asker = api.whoami()
        # Who asks is a courtesy; whatever keeps it from being said, the refusal is what counts.
        except Exception:
            raise error from None
        role = asker.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubError(f"{repo_id}: this token only reads; `hf auth login` with one that writes") from error
        names = {asker.get("name"), *(group.get("name") for group in asker.get("orgs", []))}
        if repo_id.partition("/")[0] not in names:
            raise HubError(f"{repo_id}: the name belongs to somebody else; this token is of {quote(asker.get('name'))}") from error
        raise


def _repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> ModelInfo:
    """What the Hub knows of the repository, made if there was none."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        # Not `exist_ok`: a name that exists and cannot be read belongs to somebody else.
        api.create_repo(repo_id, private=private)
        info = api.model_info(repo_id, revision=revision)
    if private and info.private is False:
        raise HubError(f"{repo_id}: expected a private repository, found one that everybody reads; change that in its settings on the Hub")
    return info


def _remote(api: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    try:
        return {entry.path: entry for entry in api.list_repo_tree(repo_id, revision=revision) if isinstance(entry, RepoFile)}
    except (KeyError, TypeError):
        # A mirror that lists files without their hashes. The client asks again before it uploads.
        return {}


def _same(files: Mapping[str, bytes | Path], remote: Mapping[str, RepoFile]) -> bool:
    """Whether every file is there already, by its hash: SHA-256 of a large one, git's own of the others."""
    for name, source in files.items():
        there = remote.get(name)
        if there is None:
            return False
        content = source if isinstance(source, bytes) else source.read_bytes()
        if there.lfs is not None:
            if hashlib.sha256(content).hexdigest() != there.lfs.sha256:
                return False
        elif hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() != there.blob_id:
            return False
    return True
