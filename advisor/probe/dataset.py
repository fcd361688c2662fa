"""What does a dataset hold: its kind, its size, its lengths in tokens, and what is wrong with it.

Goes in: a file, a folder or a hub id. Comes out: `DatasetProfile`. Every row is looked at once, in bounded
memory; tokens are counted on a spread sample. Never does: change the data; train; judge whether it is enough.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec

from advisor.errors import DataError
from advisor.probe import hub
from advisor.probe.languages import languages_of
from advisor.probe.lengths import Lengths, measure, pair_similarity
from advisor.probe.scan import EXAMPLES, Scan, texts_of
from advisor.rows import data_files, detect_format, infer_mapping, read_rows, rule_table
from advisor.rows.formats import suffix_format
from advisor.templates import refuses_consecutive_turns
from advisor.types import DatasetProfile, Finding

FIRST_ROWS = 64
"""Rows from which kind and mapping are inferred."""


def profile_dataset(
    source: str,
    *,
    name: str | None = None,
    tokenizer_file: Path | None = None,
    chat_template: str | None = None,
    sample_rows: int = 1000,
    offline: bool = False,
) -> DatasetProfile:
    """Look at every row of a dataset and return what it holds.

    Args:
        source: a file, a folder, or the hub id of a dataset.
        name: what to call it; None: by its file name.
        tokenizer_file: tokenizer.json of the model that will learn it; None: tokens are estimated.
        chat_template: of that model.
        sample_rows: how many rows to count tokens on.
        offline: for a hub id, use only the local cache.

    Raises:
        DataError: missing, empty, broken, of unknown form, or without a single row to learn from.
        HubError: the hub refuses or is out of reach.
    """
    path = _resolve(source, offline=offline)
    documents = _documents(path)
    if documents and not any(suffix_format(file) for file in documents):
        return _unread(path, name or _stem(source), documents)
    files = data_files(path)
    kinds = sorted({detect_format(file) for file in files})
    digest = hashlib.sha256()
    rows = read_rows(path, on_bytes=digest.update)
    first = list(itertools.islice(rows, FIRST_ROWS))
    kind, mapping = infer_mapping([row for _, row in first], where=source)
    if documents:
        kind = "documents"
    scan = Scan(kind, mapping, sample_rows=sample_rows)
    for number, row in itertools.chain(first, rows):
        scan.add(number, row)
    _require_rows(scan, source)
    lengths = measure(
        scan.spread(), scan.longest, kind, tokenizer_file=tokenizer_file, chat_template=chat_template
    )
    alternating = chat_template is not None and refuses_consecutive_turns(chat_template)
    findings = [
        *scan.findings(alternating=alternating), *_refused(lengths), *_unread_pdfs(documents)
    ]  # fmt: skip
    profile = DatasetProfile(
        name=name or _stem(source),
        origin="probed",
        kind=kind,
        rows=scan.rows,
        path=str(path.absolute()),
        sha256=digest.hexdigest(),
        bytes=sum(file.stat().st_size for file in (documents or files)),
        format=kinds[0] if len(kinds) == 1 else "mixed",
        columns=tuple(dict.fromkeys(column for _, row in first for column in row)),
        mapping=mapping,
        languages=_languages(scan),
        duplicate_fraction=round(scan.duplicate_fraction(), 4),
        mixed_templates=scan.mixed_templates(),
        findings=tuple(findings),
    )
    return _with_specifics(_with_lengths(profile, lengths), scan)


def _resolve(source: str, *, offline: bool) -> Path:
    """Return the local place of what was given; a hub id is fetched."""
    path = Path(source).expanduser()
    if path.exists() or not hub.is_hub_id(source) or suffix_format(path) is not None:
        return path
    return hub.fetch_dataset(source, offline=offline).path


def _stem(source: str) -> str:
    name = Path(source).name.removesuffix(".gz")
    return Path(name).stem if suffix_format(Path(name)) else name


def _documents(path: Path) -> list[Path]:
    """Return the texts and PDFs of a folder that holds nothing structured; empty otherwise."""
    if not path.is_dir():
        return []
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    if any(suffix_format(file) not in (None, "text") for file in files):
        return []
    return [file for file in files if suffix_format(file) == "text" or file.suffix.lower() == ".pdf"]


def _unread(path: Path, name: str, documents: list[Path]) -> DatasetProfile:
    """A folder of PDFs only: their size is all that is known."""
    return DatasetProfile(
        name=name,
        origin="probed",
        kind="documents",
        path=str(path.absolute()),
        bytes=sum(file.stat().st_size for file in documents),
        findings=tuple(_unread_pdfs(documents)),
    )


def _unread_pdfs(documents: list[Path]) -> Iterator[Finding]:
    pdfs = [file for file in documents if file.suffix.lower() == ".pdf"]
    if pdfs:
        yield Finding(
            code="pdf_not_read",
            severity="warning",
            message=f"{len(pdfs)} PDF files are counted by size only; their text is not read.",
            count=len(pdfs),
            examples=tuple(file.name for file in pdfs[:EXAMPLES]),
            remedy="Convert them to text: pdftotext -layout FILE.pdf",
        )


def _require_rows(scan: Scan, source: str) -> None:
    """Refuse data of which not one row can be learned from.

    Raises:
        DataError: with each problem, its count and row numbers.
    """
    if scan.usable:
        return
    problems = list(scan.findings(alternating=False))
    told = " ".join(
        f"{finding.message} ({', '.join(finding.examples)})"
        for finding in problems
        if finding.code in scan.problems
    )
    raise DataError(
        f"{source} holds nothing to learn from. {told}", problems[0].remedy, code="nothing_to_learn"
    )


def _refused(lengths: Lengths | None) -> Iterator[Finding]:
    if lengths is not None and lengths.refused:
        yield Finding(
            code="template_refuses",
            severity="warning",
            message=f"Of the sampled rows, {len(lengths.refused)} are refused. {lengths.refusal}",
            count=len(lengths.refused),
            examples=tuple(f"row {number}" for number in lengths.refused[:EXAMPLES]),
            remedy="Mend the turns of these rows, or take a model whose template accepts them.",
        )


def _languages(scan: Scan) -> tuple[str, ...]:
    least = rule_table("profile")["limits"]["share_mixture"]
    return languages_of((" ".join(texts_of(said)) for _, said in scan.spread()), least_share=least)


def _with_lengths(profile: DatasetProfile, lengths: Lengths | None) -> DatasetProfile:
    if lengths is None:
        return profile
    return msgspec.structs.replace(
        profile,
        mean_tokens=lengths.mean,
        p50_tokens=lengths.p50,
        p95_tokens=lengths.p95,
        max_tokens=lengths.longest,
        lengths=lengths.histogram,
        tokens_measured=lengths.measured,
        mean_supervised_tokens=lengths.supervised,
    )


def _with_specifics(profile: DatasetProfile, scan: Scan) -> DatasetProfile:
    """Add what only one kind of data has."""
    if profile.kind == "classification":
        return msgspec.structs.replace(profile, classes=len(scan.labels))
    if profile.kind == "unpaired_preference":
        wanted = scan.labels["True"] / max(1, scan.usable)
        return msgspec.structs.replace(profile, positive_fraction=round(wanted, 4))
    if profile.kind == "preference":
        return msgspec.structs.replace(profile, pair_similarity=pair_similarity(scan.spread()))
    if profile.kind == "tool_calling":
        return msgspec.structs.replace(profile, has_tools_column="tools" in profile.mapping)
    return profile
