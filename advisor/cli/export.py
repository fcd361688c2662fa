"""`ftadvisor export RUN_DIR_or_MODEL_DIR`: write files that run elsewhere, and prove them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from advisor.cli.options import Json, Offline, Out
from advisor.cli.output import notifier, print_json, print_text
from advisor.errors import VerificationError
from advisor.export import export_model
from advisor.run.page import write_page
from advisor.types import Export, Verification
from advisor.verify import heldout_rows, verify_gguf

app = typer.Typer(rich_markup_mode=None, add_completion=False)


class ExportAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `export --json`."""

    schema: str = "ftadvisor.export/1"
    ok: bool
    export: Export
    verifications: tuple[Verification, ...]


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="Run folder, or a Hugging Face model folder.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option("--to", help="gguf, merged, lora-gguf, modelfile; comma-separated.")
    ] = "gguf",
    quant: Annotated[
        str,
        typer.Option("--quant", help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M; comma-separated."),
    ] = "F16,Q4_K_M",
    out: Out = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove each GGUF file.")] = True,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Write a run or a model folder as GGUF, merged weights, LoRA-GGUF or Modelfile; prove each GGUF."""
    notify = notifier(quiet=as_json)
    made = export_model(
        source,
        to=_words(to.lower()),
        quants=_words(quant.upper()),
        out=out,
        offline=offline,
        on_progress=notify,
    )
    proofs = prove(made, source, offline=offline, quiet=as_json) if verify else ()
    passed = all(proof.passed for proof in proofs)
    if (source / "plan.json").is_file():
        write_page(source)
    if as_json:
        print_json(ExportAnswer(ok=passed, export=made, verifications=proofs))
    else:
        from advisor.ui.render import export as draw

        print_text(draw(made, proofs))
    if not passed:
        if as_json:
            raise typer.Exit(1)
        raise VerificationError(
            "An exported file does not answer as the trained model does; do not ship it.",
            "See the failed checks above and the .verification.json beside the file.",
        )


def prove(made: Export, source: Path, *, offline: bool, quiet: bool) -> tuple[Verification, ...]:
    """Verify every GGUF model file of an export against its source."""
    notify = notifier(quiet=quiet)
    rows = heldout_rows(source)
    return tuple(
        verify_gguf(Path(file.path), against=source, rows=rows, offline=offline, on_progress=notify)
        for file in made.files
        if file.kind == "gguf"
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
