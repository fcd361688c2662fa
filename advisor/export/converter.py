"""Finds llama.cpp's own converter: in a folder that was named, kept from before, or fetched once.

Goes in: a folder, or nothing. Comes out: the folder with convert_hf_to_gguf.py. Never does: fetch under
`offline`; compile; use a kept copy that was changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

from advisor.errors import ExportError, UsageError
from advisor.export.files import complete_folder, need_space
from advisor.gguf_rules import rules
from advisor.storage import file_sha256, read_record, write_json
from advisor.types import Record

PROGRAM = "convert_hf_to_gguf.py"
_PACKAGE = "llama-cpp-python"
_PARTS = (PROGRAM, "conversion/", "gguf-py/gguf/", "LICENSE")
"""Of vendor/llama.cpp in the source package."""
_FETCH_BYTES = 512 << 20
_RECORD = "source.json"


class ConverterSource(Record, frozen=True, kw_only=True):
    """Where a kept converter came from."""

    version: str
    """Of llama-cpp-python, whose llama.cpp then reads the file."""
    archive_sha256: str
    contents_sha256: str


def find_converter(
    named: Path | None, *, cache: Path, offline: bool, on_progress: Callable[[str], None]
) -> Path:
    """Return the folder of the converter.

    Args:
        named: A checkout of llama.cpp, or None.
        cache: Where a fetched one is kept.
        offline: Fetch nothing.
        on_progress: Told when something is fetched.

    Raises:
        UsageError: the named folder is no checkout.
        ExportError: nothing is kept and nothing may or can be fetched; says what to do.
    """
    if named is not None:
        if not (named / PROGRAM).is_file():
            raise UsageError(
                f"{named} has no {PROGRAM}.", "Name a checkout of llama.cpp: --llama-cpp llama.cpp"
            )
        return named.resolve()
    version = importlib.metadata.version(_PACKAGE)
    kept = cache / f"converter-{version}"
    if _is_whole(kept):
        return kept
    if offline:
        raise ExportError(
            f"This architecture needs llama.cpp's own converter, which is not here, and --offline forbids to "
            f"fetch it ({_PACKAGE} {version}, 77 MB).",
            "Leave --offline out once, or name a checkout: --llama-cpp llama.cpp",
        )
    need_space(cache, _FETCH_BYTES)
    on_progress(f"fetching the converter that came with {_PACKAGE} {version} (77 MB, once)")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as place:
        archive = _download(version, Path(place))
        found = file_sha256(archive)
        expected = rules().converter.sha256.get(version, found)
        if found != expected:
            raise ExportError(
                f"The source package of {_PACKAGE} {version} has the checksum {found[:12]}… instead of "
                f"{expected[:12]}….",
                "Do not use it; name a checkout that you trust: --llama-cpp llama.cpp",
            )
        with complete_folder(kept) as aside:
            _unpack(archive, aside)
            record = ConverterSource(
                version=version, archive_sha256=found, contents_sha256=contents_sha256(aside)
            )
            write_json(aside / _RECORD, record)
    return kept


def _is_whole(kept: Path) -> bool:
    file = kept / _RECORD
    if not file.is_file():
        return False
    record = read_record(file, ConverterSource, remedy=f"Remove {kept}.")
    return record.contents_sha256 == contents_sha256(kept)


def contents_sha256(folder: Path) -> str:
    """Return one checksum for names and contents of all files, compiled ones and the record left out."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _RECORD and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return total.hexdigest()


def _download(version: str, place: Path) -> Path:
    """Let pip fetch the source package; it reads its metadata, but builds nothing."""
    pip = sys.executable
    if importlib.util.find_spec("pip") is None:
        try:
            venv.create(place / "pip", with_pip=True)
        except (subprocess.CalledProcessError, OSError) as problem:
            raise ExportError(
                f"Fetching the converter needs pip, which cannot be set up: {problem}.",
                f"Install pip into this environment: {sys.executable} -m ensurepip",
            ) from problem
        pip = str(place / "pip" / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    done = subprocess.run(
        [
            pip, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--no-binary", _PACKAGE, "--dest", str(place), f"{_PACKAGE}=={version}",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    archives = sorted(place.glob("*.tar.gz"))
    if done.returncode != 0 or not archives:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ExportError(
            f"pip could not fetch the source package of {_PACKAGE} {version}: "
            f"{lines[-1].strip() if lines else 'it does not say why'}",
            "Check the connection, or name a checkout: --llama-cpp llama.cpp",
        )
    return archives[0]


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the converter and its library alone."""
    with tarfile.open(archive) as package:
        for member in package:
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            stream = package.extractfile(member) if inside.startswith(_PARTS) and member.isfile() else None
            if stream is None or ".." in Path(inside).parts:
                continue
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            with stream, (target / inside).open("wb") as file:
                shutil.copyfileobj(stream, file)
    if not (target / PROGRAM).is_file():
        raise ExportError(
            f"The source package {archive.name} holds no {PROGRAM}.",
            "Name a checkout of llama.cpp: --llama-cpp llama.cpp",
        )
