"""What can go wrong between here and the Hub, in words; and the step that gives timm's own `hf-hub:` and `local-dir:` names those words.

Tokens are never part of a message: only what the client and the server say is quoted, with anything that looks like one left out.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub
from timm.models import _factory, is_model
from timm.models._hub import hf_split

from ..errors import CompressError, HubError, VariantError

CONFIG = "config.json"

# Arguments of timm's factory: whoever loads chooses these, a file does not.
_FACTORY = frozenset(
    {"model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir"}
    | {"scriptable", "exportable", "no_jit", "device", "dtype", "features_only", "out_indices", "feature_cls"}
)
_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{6,}|(?<=Bearer )\S+|//[^/\s:@]+:[^/\s@]+(?=@)")
_LONGEST = 200


@contextmanager
def hub_errors(repository: str, file: str | None = None, *, keep_type: bool = False, token: str | None = None) -> Iterator[None]:
    """Turn whatever the Hub's client raises within into a `HubError` that says what to do.

    Args:
        repository: `OWNER/NAME` or `OWNER/NAME@REVISION`, for the message.
        file: The file that is being read or written, if it is a single one.
        keep_type: Raise an error that is of the client's type too, for callers that know nothing of this package.
        token: One that was given by hand, never to be shown.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        message = _without(token, f"{repository}: {explain(error, repository, file)}")
        new = _of_both(error, message) if keep_type else HubError(message)
        # A traceback shows the whole chain, and servers quote what they were sent.
        text = " ".join(f"{cause} {cause!r}" for cause in _causes(error))
        raise new from (error if _without(token, text) == text else None)


def _without(token: str | None, text: str) -> str:
    """A text without tokens: the given one, the stored one, and what looks like one."""
    for secret in (token, huggingface_hub.get_token()):
        if secret:
            text = text.replace(secret, "…")
    return _SECRET.sub("…", text)


def explain(error: BaseException, repository: str, file: str | None = None) -> str:
    """What went wrong, and what to do about it, in one line."""
    for cause in _causes(error):
        for kind, words in _KINDS:
            if isinstance(cause, kind):
                return words(repository, file)
        if isinstance(cause, hub.RepositoryNotFoundError | hub.HfHubHTTPError):
            return _refusal(cause)
        if isinstance(cause, hub.FileMetadataError):
            return f"what answers is no Hub ({quote(cause)}); check HF_ENDPOINT"
        if isinstance(cause, hub.HFValidationError):
            return f"expected OWNER/NAME: {quote(cause)}"
        if isinstance(cause, json.JSONDecodeError):
            return f"what answers is no Hub, or it failed: expected JSON ({quote(cause)}); try again later, and check HF_ENDPOINT"
        if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
            return f"{file or 'a file'} arrived incomplete ({quote(cause)}); try again"
        # The HTTP client's own errors, by what they are called: which client that is, the Hub's client decides.
        if type(cause).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3")) or isinstance(
            cause, ConnectionError | TimeoutError
        ):
            return f"the connection failed or broke off ({type(cause).__name__}: {quote(cause)}); try again"
    return f"{type(error).__name__}: {quote(error)}"


def quote(what: object) -> str:
    """One line of what somebody else said, without secrets and not too long."""
    text = _without(None, " ".join(str(what).split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: the client wraps the one that says most."""
    seen: set[int] = set()
    causes = []
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        causes.append(current)
        current = current.__cause__ or current.__context__
    # An error that only says "not in the cache" hides the reason it was looked for there.
    yield from (cause for cause in causes if not isinstance(cause, hub.LocalEntryNotFoundError) or cause is causes[-1])


def _refusal(error: hub.HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.server_message or error.response.headers.get("X-Error-Message") or ""
    said = f" ({quote(said)})" if said else ""
    if isinstance(error, hub.RepositoryNotFoundError) and status != 401:
        return "no such repository, or a private one that this token (or no token) does not open; check the name, and `hf auth whoami`"
    if status == 401:
        return (
            f"the Hub does not know who asks{said}: no token, an expired or wrong one, or no such repository; check the name, then "
            "`hf auth login` or HF_TOKEN"
        )
    if status == 403:
        return f"this token may not do that{said}: it only reads, or the name belongs to somebody else"
    if status == 409:
        return f"the Hub reports a conflict{said}: the name is taken, or somebody else changed it meanwhile"
    if status == 412:
        return f"somebody else pushed meanwhile{said}; push again"
    if status == 429:
        return f"the Hub asks to wait{said}; try again later"
    if status >= 500:
        return f"the Hub failed with status {status}{said}; try again later"
    return f"the Hub refused with status {status}{said or f': {quote(error)}'}"


def _revision(repository: str) -> str:
    return repr(repository.partition("@")[2] or "main")


_KINDS: tuple[tuple[type[BaseException], Callable[[str, str | None], str]], ...] = (
    (hub.GatedRepoError, lambda *_: "gated: its owner decides who reads it; ask for access on its page, then `hf auth login` or HF_TOKEN"),
    (hub.DisabledRepoError, lambda *_: "the Hub has disabled this repository"),
    (hub.RevisionNotFoundError, lambda repository, _: f"no revision {_revision(repository)}"),
    (hub.RemoteEntryNotFoundError, lambda _, file: f"no {file or 'such file'} in it; other formats are not read"),
    (hub.OfflineModeIsEnabled, lambda _, file: f"{'not in the cache, and ' if file else ''}HF_HUB_OFFLINE forbids to reach the Hub"),
)
"""Errors whose type says it all, the more special ones first."""


@functools.cache
def _both(kind: type[BaseException]) -> type[HubError]:
    if issubclass(HubError, kind):
        return HubError
    return type("HubError", (kind, HubError), {"__module__": HubError.__module__, "__str__": lambda self: self.args[0]})


def _of_both(error: Exception, message: str) -> HubError:
    """A `HubError` that handlers of the original error catch as well."""
    cls = _both(type(error))  # type: ignore[arg-type]
    new = cls.__new__(cls, message)
    new.args = (message,)
    new.__dict__.update({name: value for name, value in vars(error).items() if name != "server_message"})
    return new


def forget(path: Path) -> None:
    """Remove a file from the Hub client's cache, where names are links to what was downloaded.

    Where a link leads is the server's choice, so nothing is removed outside the repository's own downloads.
    """
    links = path.parent.resolve()
    blob = Path(os.path.abspath(links / os.readlink(path))) if path.is_symlink() else path
    path.unlink(missing_ok=True)
    if blob.parent.name == "blobs" and blob.parent.parent in links.parents:
        blob.unlink(missing_ok=True)


def install() -> None:
    """Make timm's factory say, in this package's words, why a `hf-hub:` or `local-dir:` name leads to no configuration.

    timm reads config.json before any entrypoint is asked, so that an entrypoint cannot. What timm returns is passed on as it is; for
    compressed architectures it is checked first.
    """
    read_remote, read_local = _factory.load_model_config_from_hf, _factory.load_model_config_from_path

    @functools.wraps(read_remote)
    def remote(model_id: str, cache_dir: Any = None) -> Any:
        def read() -> Any:
            try:
                return read_remote(model_id, cache_dir=cache_dir)
            except (json.JSONDecodeError, UnicodeDecodeError):
                # The client takes what it has for good; see `weights.downloaded`.
                repository, revision = hf_split(model_id)
                cached = huggingface_hub.try_to_load_from_cache(repository, CONFIG, cache_dir, revision)
                if isinstance(cached, str):
                    with suppress(OSError):
                        forget(Path(cached))
                raise

        if model_id.count("@") > 1:
            raise HubError(f"{model_id}: expected OWNER/NAME or OWNER/NAME@REVISION")
        return _checked(read, hf_split(model_id)[0], lambda: hub_errors(model_id, CONFIG, keep_type=True))

    @functools.wraps(read_local)
    def local(model_path: Any) -> Any:
        return _checked(lambda: read_local(model_path), str(model_path), lambda: _of_file(str(model_path)))

    _factory.load_model_config_from_hf = remote
    _factory.load_model_config_from_path = local


@contextmanager
def _of_file(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        message = f"{path}: expected a directory with {CONFIG}, found no {CONFIG}"
        raise _of_both(error, message) from error


def _checked(read: Callable[[], Any], where: str, errors: Callable[[], Any]) -> Any:
    try:
        with errors():
            cfg, architecture, args = _parsed(read, where)
    except RecursionError as error:
        raise VariantError(f"{where}: {CONFIG}: nested too deeply") from error
    if not (isinstance(architecture, str) and isinstance(cfg, dict) and isinstance(args, dict)):
        raise VariantError(f"{where}: {CONFIG}: expected architecture, pretrained_cfg and model_args, found other types")
    if "__" not in architecture:
        return cfg, architecture, args
    if not is_model(architecture):
        raise VariantError(
            f"{where}: {CONFIG}: architecture {architecture[:80]!r} is unknown to this version; upgrade zoo_compress, or timm if it lacks "
            f"{architecture[:80].partition('__')[0]!r}"
        )
    for key in sorted(args.keys() & _FACTORY):
        raise VariantError(f"{where}: {CONFIG}: model_args: {key!r} is an argument of the factory, not of a model")
    cfg.pop("state_dict", None)
    return cfg, architecture, args


def _parsed(read: Callable[[], Any], where: str) -> Any:
    try:
        return read()
    # What timm raises over content that is no configuration: not JSON, not an object, no architecture.
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {quote(error)}"
        raise VariantError(f"{where}: {CONFIG}: expected JSON that timm or zoo_compress wrote: {reason}") from error
    except ValueError as error:
        # A plain one is Python's about a number of thousands of digits; others are the Hub's client's.
        if type(error) is not ValueError and type(error).__name__ != "JSONDecodeError":
            raise
        raise VariantError(f"{where}: {CONFIG}: expected JSON that timm or zoo_compress wrote: {quote(error)}") from error
