"""Exports a trained model: which targets, in which order, with what notes.

Goes in: a run folder or a Hugging Face folder. Comes out: files and export.json in the output folder.
Never does: change the source; leave a half file; claim a type that a tensor does not have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from advisor.errors import ExportError, MissingPackageError, UnknownNameError, UsageError
from advisor.export.adapter import Adapter, check_merges, grown_config, open_adapter
from advisor.export.adapter_folder import folder_bytes, write_adapter
from advisor.export.architecture import MetaValue, ModelPlan, plan_model
from advisor.export.checkpoint import optional_json
from advisor.export.config_fields import is_tied, vocabulary_rows
from advisor.export.converter import find_converter
from advisor.export.encode import Type
from advisor.export.files import complete_file, need_space
from advisor.export.gguf_file import (
    Contents,
    Types,
    check_complete,
    planned_contents,
    uniform_types,
    write_gguf,
)
from advisor.export.importance import Importance
from advisor.export.lora_file import check_lora, write_lora
from advisor.export.merged import Merged, open_merged
from advisor.export.merged_folder import merged_bytes, write_merged
from advisor.export.modelfile import has_template, modelfile
from advisor.export.native import run_llama
from advisor.export.official import Conversion, needs_converter
from advisor.export.prefix_file import write_prefix
from advisor.export.record import write_record
from advisor.export.source import Trained, find_trained, refuse_a_head
from advisor.export.tokenizer import Vocabulary, read_vocabulary, with_virtual_tokens
from advisor.gguf_rules import checked_quants, rules
from advisor.prefix_state import Prefix
from advisor.probe.gguf_file import PREFIX_KEY, PREFIX_SHA256_KEY
from advisor.storage import file_sha256, write_atomic
from advisor.types import Export, ExportedFile

TARGETS = ("gguf", "merged", "modelfile", "adapter", "lora-gguf", "prefix-state")
METADATA_BYTES = 64 << 20
"""Room for the tokenizer and the metadata of one file in the disk check; a 256k vocabulary takes 20 MB."""
Progress = Callable[[str], None]
_PREFIX_NOTE = (
    "the GGUF is the base; the training is in {file}, a sequence state that llama-cpp-python loads "
    "(ftadvisor chat does): keep both files together. Any other program answers as before the training"
)
_TEMPLATE_NOTE = (
    "the Modelfile leaves the chat template to Ollama, whose older releases know those of common models "
    "alone: compare its first answers with those of ftadvisor chat"
)


def _silent(_: str) -> None:
    """Say nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One export: what is exported and where to."""

    trained: Trained
    config: dict[str, Any]
    adapter: Adapter | None
    merged: Merged
    importance: Importance | None
    out: Path
    on_progress: Progress


def export_model(
    source: Path,
    *,
    to: Sequence[str] = ("gguf",),
    quants: Sequence[str] = ("F16",),
    importance: Importance | None = None,
    out: Path | None = None,
    offline: bool = False,
    llama_cpp: Path | None = None,
    cache: Path | None = None,
    on_progress: Progress = _silent,
) -> Export:
    """Export a run folder or a Hugging Face folder.

    Args:
        source: What to export.
        to: Some of `TARGETS`.
        quants: GGUF quantisations, for example F16, Q8_0, Q4_K_M.
        importance: Of the columns of each matrix, for quantisations with fewer than eight bits.
        out: Folder for the files; None takes `export` in the source.
        offline: Never ask the hub for the base model, nor fetch llama.cpp's converter.
        llama_cpp: A checkout of llama.cpp, whose converter writes architectures that are not known here.
        cache: Where a fetched converter is kept; None: beside the files.
        on_progress: Told in a few words what is being done.

    Returns:
        The files with their checksums, those of earlier exports of the same model too; also export.json.

    Raises:
        UnknownNameError: a target or quantisation does not exist.
        InputError: the source is not usable.
        ExportError: the model cannot be exported as asked; the reason is given.
        DiskError: not enough space (checked before), or the disk filled up.
    """
    targets, wanted = _checked(to, tuple(quants))
    _need_packages()
    trained = find_trained(source, offline=offline, on_progress=on_progress)
    refuse_a_head(trained)
    place = out or Path(trained.folder) / "export"
    if needs_converter(trained.config) and targets == ("gguf",):
        if trained.adapter is not None:
            check_merges(Path(trained.adapter))
        converter = find_converter(llama_cpp, cache=cache or place, offline=offline, on_progress=on_progress)
        return _convert(source, trained, converter, wanted, importance, place, on_progress)
    adapter = None if trained.adapter is None else open_adapter(Path(trained.adapter))
    config = trained.config
    merged = open_merged(Path(trained.base), adapter, config)
    job = Job(
        trained=trained, config=config, adapter=adapter, merged=merged, importance=importance, out=place,
        on_progress=on_progress,
    )  # fmt: skip
    files, notes = _export(job, targets, wanted)
    made = Export(source=str(source), files=tuple(files), notes=tuple(notes))
    return write_record(place, made, trained, importance, on_progress)


def _convert(
    source: Path,
    trained: Trained,
    converter: Path,
    quants: tuple[str, ...],
    importance: Importance | None,
    out: Path,
    on_progress: Progress,
) -> Export:
    """Let llama.cpp's own converter write the files of an architecture that is not known here."""
    folders = Path(trained.tokenizer), Path(trained.base)
    vocabulary = read_vocabulary(*folders, rows=vocabulary_rows(trained.config))
    work = Conversion(
        trained=trained, vocabulary=vocabulary, converter=converter, out=out, importance=importance,
        on_progress=on_progress,
    )  # fmt: skip

    def path_of(quant: str) -> Path:
        return out / f"{trained.name}-{quant}.gguf"

    mixed = rules().quantisations.through_llama if importance is not None else ()
    files = [
        msgspec.structs.replace(
            _file(path_of(quant), "gguf", quant=quant, found=found), importance=quant in mixed
        )
        for quant, found in work.write(quants, path_of)
    ]
    note = "written by llama.cpp's own converter, with the tokenizer as it was trained"
    made = Export(source=str(source), files=tuple(files), notes=(*vocabulary.notes, note))
    return write_record(out, made, trained, importance, on_progress)


def _checked(to: Sequence[str], quants: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for target in to:
        if target not in TARGETS:
            raise UnknownNameError("export target", target, TARGETS, "ftadvisor export --help")
    wanted = checked_quants(quants)
    if not to or ("gguf" in to and not wanted):
        raise UsageError("Nothing was asked for.", "For example: --to gguf --quant F16,Q4_K_M")
    if "modelfile" in to and "gguf" not in to:
        raise UsageError("A Modelfile names a GGUF file.", "Ask for both: --to gguf,modelfile")
    return tuple(dict.fromkeys(to)), wanted


def _need_packages() -> None:
    for module, package in (("gguf", "gguf"), ("llama_cpp", "llama-cpp-python")):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(package, "gguf")


def _export(
    job: Job, targets: tuple[str, ...], quants: tuple[str, ...]
) -> tuple[list[ExportedFile], list[str]]:
    """Refuse what cannot be done and check the space for all of it, before anything is written."""
    files: list[ExportedFile] = []
    notes: list[str] = []
    prepared = _prepare(job) if "gguf" in targets else None
    apart = _adapter_of(job) if "adapter" in targets else None
    adapter = _lora_of(job) if "lora-gguf" in targets else None
    prefix = _prefix_of(job, targets)
    if "merged" in targets and (job.merged.prompt is not None or prefix is not None):
        raise ExportError(
            "Virtual tokens cannot be merged into an ordinary model folder.",
            "Export them as GGUF, --to gguf, or load the adapter with peft.",
        )
    if not {"gguf", "prefix-state"} & set(targets):
        prefix = None  # it lies in the adapter's folder as it is
    needed = merged_bytes(job.merged) if "merged" in targets else 0
    needed += 0 if apart is None else folder_bytes(apart)
    needed += 0 if prefix is None else prefix.keys.nbytes + prefix.values.nbytes
    need_space(job.out, needed + METADATA_BYTES)
    types = _types(job, *prepared, quants) if prepared else {}
    files_bytes = (
        sum(planned_contents(prepared[0], kinds).weight_bytes for kinds in types.values()) if prepared else 0
    )
    need_space(job.out, needed + files_bytes + METADATA_BYTES * (len(types) + 1))
    if "merged" in targets:
        job.on_progress("writing the merged weights")
        files += write_merged(job.out / f"{job.trained.name}-merged", job.trained, job.config, job.merged)
    if apart is not None:
        job.on_progress("writing the adapter")
        files += write_adapter(job.out / f"{job.trained.name}-adapter", job.trained, apart)
    stated: dict[str, MetaValue] = {}
    if prefix is not None:
        files.append(_write_prefix(job, prefix))
        stated = {PREFIX_KEY: Path(files[-1].path).name, PREFIX_SHA256_KEY: files[-1].sha256}
        notes.append(_PREFIX_NOTE.format(file=stated[PREFIX_KEY]))
    if prepared is not None:
        plan, vocabulary = prepared
        plan = msgspec.structs.replace(plan, metadata=plan.metadata | stated)
        notes += [*plan.notes, *vocabulary.notes]
        made = _write_quants(job, plan, vocabulary, types, quants)
        files += made
        if "modelfile" in targets:
            files.append(_write_modelfile(job, made, vocabulary))
            given = not vocabulary.chat_template or has_template(vocabulary, _tokenizer_settings(job))
            notes += [] if given else [_TEMPLATE_NOTE]
    if adapter is not None:
        files.append(_write_lora(job, adapter))
    return files, notes


def _prepare(job: Job) -> tuple[ModelPlan, Vocabulary]:
    count = 0 if job.merged.prompt is None else len(job.merged.prompt)
    plan = plan_model(grown_config(job.config, count), own_head=job.merged.own_head)
    check_complete(plan, job.merged)
    if job.importance is not None:
        job.importance.check(plan)
    folders = Path(job.trained.tokenizer), Path(job.trained.base)
    return plan, with_virtual_tokens(read_vocabulary(*folders, rows=plan.vocab - count), count)


def _adapter_of(job: Job) -> Path:
    if job.trained.adapter is None:
        raise _no_adapter()
    return Path(job.trained.adapter)


def _lora_of(job: Job) -> Adapter:
    if job.adapter is None:
        raise _no_adapter()
    check_lora(job.adapter, job.merged.layout, tied=is_tied(job.config))
    return job.adapter


def _no_adapter() -> ExportError:
    return ExportError(
        "There is no adapter: the whole model was trained.",
        "Export it with --to gguf or --to merged instead.",
    )


def _prefix_of(job: Job, targets: tuple[str, ...]) -> Prefix | None:
    """Return the trained prefix, which goes beside a GGUF file.

    Raises:
        ExportError: it is asked for where there is none, or a Modelfile, which has no place for it.
    """
    prefix = None if job.adapter is None else job.adapter.prefix
    if prefix is None and "prefix-state" in targets:
        raise ExportError(
            "There is no trained prefix: a state is made of prefix tuning alone.",
            "Export it with --to gguf instead.",
        )
    if prefix is not None and "modelfile" in targets:
        raise ExportError(
            "Ollama loads a GGUF file alone, and a trained prefix lies beside it.",
            "Export it with --to gguf and talk to it with ftadvisor chat; for Ollama train with lora.",
        )
    return prefix


def _write_prefix(job: Job, prefix: Prefix) -> ExportedFile:
    path = job.out / f"{job.trained.name}-prefix.state"
    job.on_progress("writing the prefix")
    with complete_file(path) as aside:
        write_prefix(aside, prefix, plan_model(job.config, own_head=job.merged.own_head))
    return _file(path, "prefix_state", quant="F32", found=None)


def _write_lora(job: Job, adapter: Adapter) -> ExportedFile:
    path = job.out / f"{job.trained.name}-lora.gguf"
    job.on_progress("writing the LoRA adapter")
    with complete_file(path) as aside:
        write_lora(aside, adapter, plan_model(job.config, own_head=job.merged.own_head))
    return _file(path, "lora_gguf", quant="F32", found=None)


def _types(job: Job, plan: ModelPlan, vocabulary: Vocabulary, quants: tuple[str, ...]) -> dict[str, Types]:
    """Return the type of each tensor for each quantisation; llama.cpp is asked where it mixes them."""
    facts = rules().quantisations
    found = {quant: uniform_types(plan, quant) for quant in quants if quant in facts.direct}
    mixed = [quant for quant in quants if quant not in facts.direct]
    if not mixed:
        return found
    start = job.out / f".{job.trained.name}-types.gguf"
    try:
        with complete_file(start) as aside:
            _write(job, aside, plan, vocabulary, "F32", uniform_types(plan, "F32"), merged=None)
        answer, _ = run_llama(
            {"do": "choose", "source": str(start), "quants": mixed, "importance": job.importance is not None}
        )
    finally:
        start.unlink(missing_ok=True)
    names = {tensor.name for tensor in plan.tensors}
    for quant, types in answer["types"].items():
        found[quant] = {name: getattr(Type, kind) for name, kind in types.items() if name in names}
        if set(found[quant]) != names:
            raise ExportError(
                f"llama.cpp did not say which types it gives the tensors in {quant}.",
                "Use --quant Q8_0, and report the version of llama-cpp-python.",
            )
    return found


def _write_quants(
    job: Job, plan: ModelPlan, vocabulary: Vocabulary, types: dict[str, Types], quants: tuple[str, ...]
) -> list[ExportedFile]:
    made = []
    for quant in quants:
        mixed = quant in rules().quantisations.through_llama
        job.on_progress(f"quantising to {quant}" if mixed else f"writing {quant}")
        with complete_file(_path(job, quant)) as aside:
            found = _write(job, aside, plan, vocabulary, quant, types[quant], merged=job.merged)
        file = _file(_path(job, quant), "gguf", quant=quant, found=found)
        made.append(msgspec.structs.replace(file, importance=mixed and job.importance is not None))
    return made


def _path(job: Job, quant: str) -> Path:
    return job.out / f"{job.trained.name}-{quant}.gguf"


def _write(
    job: Job,
    path: Path,
    plan: ModelPlan,
    vocabulary: Vocabulary,
    quant: str,
    types: Types,
    *,
    merged: Merged | None,
) -> Contents:
    return write_gguf(
        path, plan=plan, merged=merged, vocabulary=vocabulary, quant=quant, types=types,
        name=job.trained.name, on_progress=job.on_progress,
        importance=job.importance if quant in rules().quantisations.through_llama else None,
    )  # fmt: skip


def _write_modelfile(job: Job, made: list[ExportedFile], vocabulary: Vocabulary) -> ExportedFile:
    """Write an Ollama Modelfile for the preferred one of the files."""
    order = rules().quantisations.preferred
    best = min(made, key=lambda file: order.index(str(file.quant)))
    settings = _tokenizer_settings(job)
    path = job.out / "Modelfile"
    write_atomic(path, modelfile(Path(best.path).name, vocabulary, settings).encode())
    return _file(path, "modelfile", quant=None, found=None)


def _tokenizer_settings(job: Job) -> dict[str, Any]:
    return optional_json(Path(job.trained.tokenizer) / "tokenizer_config.json")


def _file(path: Path, kind: Any, *, quant: str | None, found: Contents | None) -> ExportedFile:
    return ExportedFile(
        path=str(path),
        kind=kind,
        quant=quant,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        bits_per_weight=None if found is None else round(found.bits_per_weight, 3),
        mix={} if found is None else found.mix,
    )
