"""`ftadvisor export RUN_DIR_or_MODEL_DIR`: write files that run elsewhere, and prove them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.errors import DiskError, VerificationError
from advisor.export import export_model
from advisor.export.files import proof_file
from advisor.export.importance import Importance
from advisor.export.modelfile import name_file
from advisor.export.record import EXPORT, read_export
from advisor.intake import own_cache_dir
from advisor.knowledge import load
from advisor.run.launch import require_installed
from advisor.run.page import write_page
from advisor.storage import file_sha256, read_record, write_json
from advisor.types import Export, ExportedFile, ExportPlan, FileRow, Plan, Verification
from advisor.verify import heldout_rows, keep_proof, verify_gguf
from advisor.verify.card import write_card
from advisor.verify.table import file_table

QUANT_HELP = (
    "F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, IQ4_XS, Q3_K_M; with commas. Default: what the plan of a "
    "run folder chose, else F16,Q4_K_M."
)


class ExportAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `export --json`."""

    schema: str = "ftadvisor.export/1"
    ok: bool
    export: Export
    verifications: tuple[Verification, ...]
    table: tuple[FileRow, ...] = ()
    """The GGUF files beside each other, one of them recommended."""


@click.command()
@click.argument("source", type=options.FILE)
@click.option(
    "--to",
    help="gguf, modelfile, merged, adapter, lora-gguf, prefix-state; with commas. "
    "Default: the plan's, else gguf.",
)
@click.option("--quant", help=QUANT_HELP)
@click.option(
    "--imatrix",
    help="Rows or text that the model reads, so that few bits keep what matters; `heldout`: the run's own.",
)
@options.out
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove each GGUF file.")
@click.option(
    "--llama-cpp", type=options.FILE, help="Checkout of llama.cpp, for architectures not known here."
)
@options.offline
@options.as_json
def export(
    source: Path,
    to: str | None,
    quant: str | None,
    imatrix: str | None,
    out: Path | None,
    llama_cpp: Path | None,
    *,
    verify: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Write a run or a model folder as GGUF, merged weights, LoRA-GGUF or Modelfile; prove each GGUF."""
    export_and_prove(
        source, to=to, quant=quant, imatrix=imatrix, out=out, llama_cpp=llama_cpp, verify=verify,
        offline=offline, as_json=as_json,
    )  # fmt: skip


def export_and_prove(
    source: Path,
    *,
    to: str | None = None,
    quant: str | None = None,
    imatrix: str | None = None,
    out: Path | None = None,
    llama_cpp: Path | None = None,
    verify: bool = True,
    offline: bool = False,
    as_json: bool = False,
) -> tuple[Export, tuple[Verification, ...]]:
    """Export, prove, print; returns what was written and proved.

    Raises:
        VerificationError: a file does not answer as the trained model does.
        Exit: the same under `as_json`, after the answer was printed.
    """
    notify = notifier(quiet=as_json)
    importance = None if imatrix is None else _importance(source, imatrix, offline=offline, quiet=as_json)
    made = export_model(
        source,
        importance=importance,
        to=_words((to or _usual_target(source)).lower()),
        quants=_words((quant or _usual_quants(source)).upper()),
        out=out,
        offline=offline,
        llama_cpp=llama_cpp,
        cache=own_cache_dir(),
        on_progress=notify,
    )
    proofs = prove(made, source, offline=offline, quiet=as_json) if verify else ()
    made, rows = describe(made, source, proofs)
    passed = all(proof.passed for proof in proofs)
    if as_json:
        print_json(ExportAnswer(ok=passed, export=made, verifications=proofs, table=rows))
    else:
        from advisor.ui.render import export as draw

        print_text(draw(made, proofs, rows))
    if not passed:
        if as_json:
            raise click.exceptions.Exit(1)
        raise VerificationError(
            "An exported file does not answer as the trained model does; do not ship it.",
            "See the failed checks above and the .verification.json beside the file.",
        )
    return made, proofs


def _importance(source: Path, named: str, *, offline: bool, quiet: bool) -> Importance:
    """Measure on the rows of a file, or on those that the run held out."""
    require_installed(("torch", "transformers", "peft"))
    # torch takes seconds to import, and an export needs none of it.
    from advisor.verify.importance import measure_importance

    rows = heldout_rows(source) if named == "heldout" else (Path(named),)
    return measure_importance(source, rows, offline=offline, on_progress=notifier(quiet=quiet))


def describe(
    made: Export, source: Path, proofs: Sequence[Verification]
) -> tuple[Export, tuple[FileRow, ...]]:
    """Write the model card of an export and the page of its run; return the export, and a table."""
    whole = msgspec.structs.replace(made, files=(*made.files, *made.kept))
    proofs = (*proofs, *_proofs(made.kept))
    rows = file_table(whole, proofs, _plan_of(source), load())
    made = _modelfile_of_best(made, rows)
    whole = msgspec.structs.replace(made, files=(*made.files, *made.kept))
    if rows:
        card = write_card(Path(rows[0].path).parent, whole, rows, proofs, _plan_of(source))
        made = msgspec.structs.replace(made, files=(*made.files, card))
    try:
        write_page(source)
    except DiskError as problem:  # the files may lie where there is room, and their run where there is none
        note = f"the report of the run does not tell of these files: {problem.message}"
        made = msgspec.structs.replace(made, notes=(*made.notes, note))
    return made, rows


def _modelfile_of_best(made: Export, rows: Sequence[FileRow]) -> Export:
    """Let the Modelfile name the recommended file, which only the proofs could tell."""
    best = next((Path(row.path) for row in rows if row.recommended), None)
    found = next((file for file in (*made.files, *made.kept) if file.kind == "modelfile"), None)
    if best is None or found is None:
        return made
    path = Path(found.path)
    name_file(path, best.name)
    new = msgspec.structs.replace(found, bytes=path.stat().st_size, sha256=file_sha256(path))
    files, kept = (
        tuple(new if file is found else file for file in group) for group in (made.files, made.kept)
    )
    made = msgspec.structs.replace(made, files=files, kept=kept)
    write_json(path.with_name(EXPORT), made)
    return made


def describe_again(source: Path) -> None:
    """Tell in card and page what the proofs in an export folder say now, wherever it was moved."""
    if (source / "export" / EXPORT).is_file():
        made = read_export(source / "export")
        describe(made, source, _proofs(made.files))


def _proofs(files: Sequence[ExportedFile]) -> tuple[Verification, ...]:
    """Return the proofs that lie beside files."""
    kept = {file.path: proof_file(Path(file.path)) for file in files if file.kind == "gguf"}
    return tuple(
        msgspec.structs.replace(read_record(proof, Verification), gguf=path)
        for path, proof in kept.items()
        if proof.is_file()
    )


def _planned(source: Path) -> ExportPlan | None:
    plan = _plan_of(source)
    return None if plan is None else plan.export


def _usual_target(source: Path) -> str:
    """Merged weights where the plan is for a server, else a GGUF."""
    chosen = _planned(source)
    return "merged" if chosen and chosen.format == "safetensors" else "gguf"


def _usual_quants(source: Path) -> str:
    """What the plan of a run folder chose; without one, a faithful file and a small one."""
    chosen = _planned(source)
    return chosen.quant if chosen and chosen.format == "gguf" and chosen.quant else "F16,Q4_K_M"


def _plan_of(source: Path) -> Plan | None:
    file = source / "plan.json"
    return read_record(file, Plan) if file.is_file() else None


def prove(made: Export, source: Path, *, offline: bool, quiet: bool) -> tuple[Verification, ...]:
    """Verify every GGUF model file of an export against its source."""
    notify = notifier(quiet=quiet)
    rows = heldout_rows(source)
    proofs = tuple(
        verify_gguf(Path(file.path), against=source, rows=rows, offline=offline, on_progress=notify)
        for file in made.files
        if file.kind == "gguf"
    )
    for proof in proofs:
        keep_proof(proof)
    return proofs


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
