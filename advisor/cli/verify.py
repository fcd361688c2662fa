"""`ftadvisor verify GGUF --against RUN_DIR_or_MODEL_DIR`: prove that the file answers as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advisor.cli.options import Json, Offline
from advisor.cli.output import notifier, print_json, print_text
from advisor.verify import heldout_rows, verify_gguf

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def verify(
    gguf: Annotated[Path, typer.Argument(help="The GGUF file.", show_default=False)],
    against: Annotated[
        Path,
        typer.Option("--against", help="Run folder or model folder it was made from.", show_default=False),
    ],
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Prove that a GGUF file answers as the trained model does; exit 1 when it does not."""
    proof = verify_gguf(
        gguf,
        against=against,
        rows=heldout_rows(against),
        offline=offline,
        on_progress=notifier(quiet=as_json),
    )
    if as_json:
        print_json(proof)
    else:
        from advisor.ui.render import verification

        print_text(verification(proof))
    if not proof.passed:
        raise typer.Exit(1)
