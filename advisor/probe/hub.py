"""Fetches models and datasets from the hub: what was asked for, at a pinned revision, resumed when cut.

Goes in: a repository id. Comes out: the local folder and the commit. All transfer is huggingface_hub's.
Never does: print a token; send telemetry; use the network with `offline`; fetch code.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from advisor import __version__
from advisor.errors import AdvisorError, DiskError, HubError, UsageError, nearest
from advisor.types import Record
from advisor.units import format_bytes

CONFIG_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json", "special_tokens_map.json", "adapter_config.json", "README.md",
    "*.safetensors.index.json",
)  # fmt: skip
MODEL_FILES = (*CONFIG_FILES, "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
MODEL_LEAVES = ("*/*", "consolidated*", "*.onnx.json")
"""Folders hold the same weights for other programs; consolidated files hold them a second time."""
DATASET_FILES = (
    "*.parquet", "*.json", "*.jsonl", "*.ndjson", "*.csv", "*.tsv", "*.txt", "*.md", "*.gz",
)  # fmt: skip
ATTEMPTS = 3
Kind = Literal["model", "dataset"]


class Snapshot(Record, frozen=True, kw_only=True):
    """Files of one repository at one commit."""

    path: Path
    revision: str


def fetch_config(
    repository: str, *, revision: str | None = None, offline: bool = False, known: Iterable[str] = ()
) -> Snapshot:
    """Fetch configuration, tokenizer and template of a model, without weights.

    Args:
        repository: hub id, `owner/name`.
        revision: branch, tag or commit; None: the main branch.
        offline: use only what is already in the cache.
        known: ids to suggest where the repository does not exist.

    Raises:
        HubError: gated, missing, out of reach, or not in the cache; with the next step.
        DiskError: the disk is full.
    """
    return _snapshot(repository, "model", CONFIG_FILES, revision, tuple(known), offline=offline)


def fetch_model(
    repository: str, *, revision: str | None = None, offline: bool = False, known: Iterable[str] = ()
) -> Snapshot:
    """Fetch a model with its safetensors weights; errors as `fetch_config`."""
    return _snapshot(
        repository, "model", MODEL_FILES, revision, tuple(known), offline=offline, check_space=True
    )


def fetch_dataset(repository: str, *, revision: str | None = None, offline: bool = False) -> Snapshot:
    """Fetch the data files of a dataset; errors as `fetch_config`."""
    return _snapshot(repository, "dataset", DATASET_FILES, revision, offline=offline, check_space=True)


def cached_file(repository: str, name: str, *, revision: str | None = None) -> Path | None:
    """Return one file of a model if it is in the cache; uses no network."""
    hub = _hub()
    found = hub.try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form of a hub id: owner/name, without spaces or further slashes."""
    owner, slash, name = text.partition("/")
    allowed = all(
        part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, name)
    )
    return bool(slash) and allowed and not text.startswith(".")


def _hub() -> ModuleType:
    # read by huggingface_hub when it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub


def _snapshot(
    repository: str,
    kind: Kind,
    patterns: tuple[str, ...],
    revision: str | None,
    known: tuple[str, ...] = (),
    *,
    offline: bool,
    check_space: bool = False,
) -> Snapshot:
    hub = _hub()
    import httpx2  # the transport of huggingface_hub

    options: dict[str, Any] = {
        "repo_type": kind,
        "revision": revision,
        "allow_patterns": list(patterns),
        "ignore_patterns": list(MODEL_LEAVES) if kind == "model" else None,
        "library_name": "ftadvisor",
        "library_version": __version__,
    }
    problem: Exception | None = None
    for _ in range(1 if offline else ATTEMPTS):
        try:
            if check_space and not offline:
                _require_space(repository, hub.snapshot_download(repository, dry_run=True, **options))
            path = hub.snapshot_download(repository, local_files_only=offline, **options)
            return Snapshot(path=Path(path), revision=Path(path).name)
        except (httpx2.HTTPError, OSError, hub.errors.EntryNotFoundError, ValueError) as error:
            # complete files stay in the cache, and the next attempt asks for the rest
            problem = error
            if not _may_pass(error):
                break
    assert problem is not None
    raise _explained(problem, repository, kind, offline=offline, known=known) from problem


def _require_space(repository: str, files: Iterable[Any]) -> None:
    """Refuse a download that the disk cannot hold, before it begins.

    Raises:
        DiskError: with what is needed and what is free.
    """
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    place = _cache_place()
    if needed > shutil.disk_usage(place).free:
        raise _disk_full(repository, place, needed)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _status(error: BaseException) -> int | None:
    if isinstance(error, _hub().errors.HfHubHTTPError):
        return int(error.response.status_code)
    return None


def _may_pass(error: Exception) -> bool:
    """Tell whether another attempt can help: the transfer was cut, rather than refused."""
    import httpx2

    causes = list(_causes(error))
    if any(isinstance(cause, httpx2.ConnectError) for cause in causes):
        return False
    return any(
        isinstance(cause, httpx2.TransportError)
        or "Consistency check failed" in str(cause)
        or (_status(cause) or 0) >= 500
        for cause in causes
    )


def _explained(
    error: Exception, repository: str, kind: Kind, *, offline: bool, known: tuple[str, ...]
) -> AdvisorError:
    """Turn huggingface_hub's error into ours, with the next step."""
    errors = _hub().errors
    page = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError):
            return HubError(
                f"The {kind} {repository} is gated: its terms must be accepted (HTTP {_status(cause)}).",
                f"Accept them at {page}, then: hf auth login",
                code="hub_gated",
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return HubError(
                f"{repository} has no such revision.", f"See {page}/commits/main", code="hub_missing"
            )
        if isinstance(cause, errors.RepositoryNotFoundError) or _status(cause) == 404:
            return _not_there(repository, kind, known)
        if _status(cause) in (401, 403):
            return HubError(
                f"The hub refuses access to the {kind} {repository} (HTTP {_status(cause)}).",
                f"Check that the token may read it: hf auth login. The terms, if any: {page}",
                code="hub_refused",
            )
        if isinstance(cause, errors.HFValidationError):
            return UsageError(
                f"{repository!r} is not a hub id.", "A hub id is owner/name, for example Qwen/Qwen3-0.6B"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return _disk_full(repository, _cache_place())
    if isinstance(error, PermissionError):
        return DiskError(f"The download folder cannot be written: {error}.", "Set HF_HOME to another folder.")
    return _unreachable(error, repository, kind, offline=offline)


def _not_there(repository: str, kind: Kind, known: tuple[str, ...]) -> HubError:
    near = nearest(repository, known, limit=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return HubError(
        f"The hub has no {kind} {repository}, or it is private.{hint}",
        "Check the spelling; for a private one: hf auth login. A local folder works too.",
        code="hub_missing",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache_place() -> Path:
    """Return the nearest folder that exists above the hub's cache."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return place


def _disk_full(repository: str, place: Path, needed: int | None = None) -> DiskError:
    free = format_bytes(shutil.disk_usage(place).free)
    wanted = f"; {repository} needs {format_bytes(needed)}" if needed else f" while fetching {repository}"
    return DiskError(
        f"The disk is full: {free} free at {place}{wanted}.",
        "Free some space or set HF_HOME to a folder on another disk; complete files are kept.",
    )


def _unreachable(error: Exception, repository: str, kind: Kind, *, offline: bool) -> HubError:
    errors = _hub().errors
    if offline:
        what = f" ({error})" if isinstance(error, errors.IncompleteSnapshotError) else ""
        return HubError(
            f"{repository} is not in the local cache, or not completely{what}.",
            f"Fetch it once with a network: hf download {repository}"
            f"{' --repo-type dataset' if kind == 'dataset' else ''}; or give a local folder.",
            code="hub_offline",
        )
    cause = "" if isinstance(error, errors.DryRunError) else f": {type(error).__name__}"
    return HubError(
        f"The hub cannot be reached, or the download of {repository} broke off{cause}.",
        "Run the command again: complete files are kept. Fetched before? Add --offline. A folder works too.",
        code="hub_unreachable",
    )
