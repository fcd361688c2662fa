"""Writes the model card beside the exported files: what they are, what was measured, how to run them.

Goes in: the export, its proofs and table, the plan. Comes out: README.md, with the front matter that the hub
reads. Never does: say of a file what was not proved; take a licence for granted; replace another's README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from advisor.export.checkpoint import optional_json
from advisor.storage import file_sha256, write_atomic
from advisor.types import Export, ExportedFile, FileRow, Plan, Verification
from advisor.units import format_bytes

_TAGS = "tags: [gguf, llama-cpp, ftadvisor]"


def write_card(
    folder: Path,
    made: Export,
    rows: Sequence[FileRow],
    proofs: Sequence[Verification],
    plan: Plan | None,
) -> ExportedFile:
    """Write README.md into the folder of the files and return it; MODEL_CARD.md where another's stands."""
    path = folder / "README.md"
    if path.is_file() and _TAGS not in path.read_text(encoding="utf-8", errors="replace"):
        path = folder / "MODEL_CARD.md"
    name = Path(rows[0].path).stem.removesuffix(f"-{rows[0].quant}")
    base = _base(made, plan)
    text = "\n".join([*_front(base, plan), f"# {name}", "", *_body(folder, made, rows, proofs, base, plan)])
    write_atomic(path, text.encode())
    return ExportedFile(
        path=str(path), kind="card", quant=None, bytes=path.stat().st_size, sha256=file_sha256(path)
    )


def _base(made: Export, plan: Plan | None) -> str | None:
    """Return the hub id of the base, where it has one."""
    if plan is not None and plan.model is not None:
        return plan.model.id
    named = optional_json(Path(made.source) / "adapter_config.json").get("base_model_name_or_path")
    return str(named) if named else None


def _front(base: str | None, plan: Plan | None) -> list[str]:
    licence = plan.model.licence if plan is not None and plan.model is not None else None
    lines = ["---", "library_name: gguf", "pipeline_tag: text-generation"]
    lines += [f"license: {licence}"] if licence else []
    lines += (
        [f"base_model: {base}"] if base and base.count("/") == 1 and not base.startswith((".", "/")) else []
    )
    return [*lines, "tags: [gguf, llama-cpp, ftadvisor]", "---", ""]


def _body(
    folder: Path,
    made: Export,
    rows: Sequence[FileRow],
    proofs: Sequence[Verification],
    base: str | None,
    plan: Plan | None,
) -> list[str]:
    lines = [_made_of(base, plan), "", *table_lines(rows), ""]
    lines += [
        "KL, top-1 and perplexity are against the trained model in 32 bits, on held-out rows where there are",
        "some; tokens per second were measured while proving, on the machine that exported.",
        "",
        "## What was proved",
        "",
        *(_proof_line(proof) for proof in proofs),
        *(f"- {Path(row.path).name}: nothing, it was not verified" for row in rows if row.proved is None),
        "",
        "## How to run it",
        "",
    ]
    best = next((row for row in rows if row.recommended), rows[0])
    file = Path(best.path).name
    lines += ["```sh", f"ftadvisor chat {file}"]
    if not any(file.kind == "prefix_state" for file in made.files):
        lines += [f"ftadvisor serve {file}", f"llama-cli -m {file}"]
    lines += ["ollama create my-model -f Modelfile"] if (folder / "Modelfile").is_file() else []
    lines += ["```", ""]
    lines += ["## Good to know", "", *(f"- {note}" for note in made.notes), ""] if made.notes else []
    lines += ["## Checksums (SHA-256)", ""]
    lines += [
        f"- `{Path(file.path).name}`: `{file.sha256}`" for file in made.files if Path(file.path).is_file()
    ]
    return [*lines, ""]


def _made_of(base: str | None, plan: Plan | None) -> str:
    what = f"made of {base}" if base else "made of a model folder"
    return f"GGUF files {what}" + (f", tuned with {plan.method} by ftadvisor." if plan is not None else ".")


def table_lines(rows: Sequence[FileRow]) -> list[str]:
    """Return the table in Markdown; the recommended file is in bold."""
    fits = any(row.fits is not None for row in rows)
    head = ["file", "size", "bits a weight", "KL", "top-1", "perplexity", "tokens/s"]
    head += ["in memory", "fits the device"] if fits else ["in memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        name = Path(row.path).name + (", importance matrix" if row.importance else "")
        cells = [
            f"**{name}** (recommended)" if row.recommended else name,
            format_bytes(row.bytes), f"{row.bits_per_weight:.2f}", *figures(row),
            format_bytes(row.running_bytes),
        ]  # fmt: skip
        cells += [{True: "yes", False: "no", None: ""}[row.fits]] if fits else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figures(row: FileRow) -> tuple[str, str, str, str]:
    """Return KL, top-1, change of perplexity and speed in words; empty where not measured."""
    return (
        "" if row.kl_mean is None else f"{row.kl_mean:.2g}",
        "" if row.top1 is None else f"{100 * row.top1:.1f} %",
        "" if row.perplexity_change is None else f"{100 * row.perplexity_change:+.2f} %",
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
    )


def _proof_line(proof: Verification) -> str:
    failed = [check.name for check in proof.checks if not check.passed]
    name = Path(proof.gguf).name
    if failed:
        return f"- {name}: FAILED {', '.join(failed)}; do not use it."
    return f"- {name}: {', '.join(check.name for check in proof.checks)}"
