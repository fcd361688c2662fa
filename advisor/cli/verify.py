"""`ftadvisor verify GGUF --against RUN_DIR_or_MODEL_DIR`: prove that the file answers as the model does."""

from __future__ import annotations

from pathlib import Path

import click

from advisor.cli import options
from advisor.cli.export import describe_again
from advisor.cli.output import notifier, print_json, print_text
from advisor.errors import DiskError
from advisor.verify import heldout_rows, keep_proof, verify_gguf


@click.command()
@click.argument("gguf", type=options.FILE)
@click.option("--against", type=options.FILE, required=True, help="Run or model folder it was made from.")
@click.option("--prefix", type=options.FILE, help="Trained prefix of a shared base.")
@options.offline
@options.as_json
def verify(gguf: Path, against: Path, prefix: Path | None, *, offline: bool, as_json: bool) -> None:
    """Prove that a GGUF file answers as the trained model does; exit 1 when it does not."""
    notify = notifier(quiet=as_json)
    proof = verify_gguf(
        gguf,
        against=against,
        rows=heldout_rows(against),
        prefix=prefix,
        offline=offline,
        on_progress=notify,
    )
    if gguf.resolve().parent == (against / "export").resolve():
        try:
            keep_proof(proof)
            describe_again(against)
        except DiskError as problem:  # what was proved holds, kept or not
            notify(f"the proof is not kept: {problem.message}")
    if as_json:
        print_json(proof)
    else:
        from advisor.ui.render import verification

        print_text(verification(proof))
    if not proof.passed:
        raise click.exceptions.Exit(1)
