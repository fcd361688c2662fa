"""`ftadvisor estimate`: the memory and time of one training step, without weights or GPU."""

from __future__ import annotations

from typing import Any, Literal

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import print_json, print_text
from advisor.errors import UnknownNameError, UsageError
from advisor.estimate.calibrate import ErrorSummary, summarise
from advisor.estimate.memory import estimate_memory
from advisor.estimate.stated import stated_tuner
from advisor.estimate.time import estimate_time
from advisor.estimate.tunable import ALIASES, TUNERS, tuner_name
from advisor.intake import hardware_of, model_spec, own_cache_dir
from advisor.knowledge import Knowledge, load
from advisor.probe.calibration import calibration_file, observations, unreadable_lines
from advisor.recommend.gates import estimated_as, unknown_of
from advisor.types import (
    Band,
    Hardware,
    MemoryEstimate,
    MemorySettings,
    ModelSpec,
    Part,
    TimeEstimate,
)

Precision = Literal["bf16", "fp16", "fp32"]
SIZES = ("virtual_tokens", "bottleneck")
"""Sizes of a tuner that its file in kb/ gives where the command line does not."""


class EstimateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `estimate --json`."""

    schema: str = "ftadvisor.estimate/1"
    ok: bool = True
    model: str
    parameters: int
    trainable_parameters: int
    peak_bytes: Band
    peak_allocated_bytes: Band
    peak_reserved_bytes: Band
    phase: str
    parts: dict[str, int]
    formulas: tuple[Part, ...]
    engine: str
    seconds_per_step: Band | None
    seconds_source: str | None
    """A key of kb/sources.toml, or `measured here on DATE (versions)`."""
    notes: tuple[str, ...]


class CalibrationAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `estimate --calibration --json`."""

    schema: str = "ftadvisor.calibration/1"
    ok: bool = True
    file: str | None
    errors: tuple[ErrorSummary, ...]
    unreadable_lines: int
    """Of the file; they are left out."""


@click.command()
@options.model
@click.option("--method", default="lora", show_default=True, help="full, lora, qlora, ia3, ...")
@click.option("--objective", default="sft", show_default=True, help="sft, dpo, kto, reward, grpo, ...")
@click.option("--micro-batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of the longest row.",
)
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=True, show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option(
    "--weight-bits",
    type=click.Choice(["4", "8", "16", "32"]),
    help="Of a stored weight of the base; by default 4 for qlora, 32 in fp32 and for osf, else 16.",
)
@click.option("--optimizer", default="adamw_torch", show_default=True)
@click.option("--lora-r", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--target", default="all-linear", show_default=True, help="all-linear, attention, q_v, mlp or names."
)
@click.option("--attention", type=click.Choice(["flash", "sdpa", "eager"]), default="sdpa", show_default=True)
@click.option("--loss", type=click.Choice(["full_logits", "chunked"]), default="chunked", show_default=True)
@click.option("--virtual-tokens", type=click.IntRange(min=1), help="Of prompt, prefix and p-tuning.")
@click.option("--bottleneck", type=click.IntRange(min=1), help="Width of bottleneck adapters.")
@click.option("--generations", type=click.IntRange(min=1), help="Answers written together (rloo, grpo).")
@click.option("--completion-tokens", type=click.IntRange(min=1), help="Of one such answer.")
@click.option("--classes", type=click.IntRange(min=1), help="Of a classifier head.")
@click.option("--packed", is_flag=True, help="Several rows in one sequence.")
@click.option("--autocast/--no-autocast", default=True, show_default=True, help="As trainers have it.")
@click.option("--adapter-bits", type=click.Choice(["16", "32"]), default="32", show_default=True)
@click.option("--double-quant/--no-double-quant", default=True, show_default=True)
@click.option("--accumulate/--no-accumulate", default=True, show_default=True, help="Several micro batches.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=1, show_default=True, help="Blocks.")
@click.option(
    "--offload", is_flag=True, help="Optimizer states, and shards of weights, in the host's memory."
)
@click.option("--offload-activations", is_flag=True, help="Block inputs wait in the host's memory.")
@click.option("--optimizer-in-backward", is_flag=True, help="No gradient is kept.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--shard", type=click.Choice(["none", "fsdp", "zero3"]), default="none", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--engine",
    type=click.Choice(["closed_form", "trace"]),
    default="closed_form",
    show_default=True,
    help="trace: run the installed libraries on tensors without data.",
)
@click.option(
    "--calibration",
    is_flag=True,
    help="Show instead how far earlier predictions on this computer were from what was measured.",
)
@options.hardware
@options.offline
@options.as_json
def estimate(
    model: str,
    method: str,
    *,
    calibration: bool,
    precision: Precision,
    weight_bits: str | None,
    engine: str,
    adapter_bits: str,
    hardware: str | None,
    offline: bool,
    as_json: bool,
    **step: Any,
) -> None:
    """Predict the memory and time of one training step; a config.json is enough, no weights are read."""
    if calibration:
        _calibration(as_json=as_json)
        return
    knowledge = load()
    inputs = options.inputs_of(model=model, hardware=hardware, offline=offline)
    spec = model_spec(inputs, knowledge)
    given = {
        **_tuner(method, knowledge),
        **{name: value for name, value in step.items() if value is not None},
    }
    settings = MemorySettings(
        precision=precision,
        weight_bits=_weight_bits(weight_bits, method, precision, knowledge),
        adapter_bits=32 if adapter_bits == "32" else 16,
        **given,
    )
    _require_known(settings, knowledge)
    found = _memory(spec, settings, engine, knowledge)
    if not found.trainable_parameters:
        raise UsageError(
            f"--target {settings.target} names no layer of {spec.id}.",
            "all-linear, attention, q_v, mlp or names.",
        )
    speed = _seconds(spec, settings, hardware_of(inputs, knowledge), knowledge)
    answer = EstimateAnswer(
        model=spec.id,
        parameters=spec.parameters,
        trainable_parameters=found.trainable_parameters,
        peak_bytes=found.peak_bytes,
        peak_allocated_bytes=found.allocated_bytes,
        peak_reserved_bytes=found.reserved_bytes,
        phase=found.phase,
        parts={part.name: part.bytes for part in found.parts},
        formulas=found.parts,
        engine=found.engine,
        seconds_per_step=speed.seconds_per_step if speed else None,
        seconds_source=speed.source if speed else None,
        notes=found.notes + (speed.notes if speed else ()),
    )
    if as_json:
        print_json(answer)
        return
    from advisor.ui.render import estimate as draw

    print_text(draw(spec, found, speed))


def _calibration(*, as_json: bool) -> None:
    """Show the errors of what was predicted here, and where they are kept."""
    place = calibration_file()
    errors, lost = summarise(observations()), unreadable_lines()
    if as_json:
        file = str(place) if place else None
        print_json(CalibrationAnswer(file=file, errors=errors, unreadable_lines=lost))
        return
    from advisor.ui.measured import calibration as draw

    kept = f"Kept in {place}: delete it to forget, copy it to share. Nothing is sent." if place else ""
    left_out = [f"{lost} of its lines cannot be read and are left out."] if lost else []
    print_text(draw(errors), kept or "Nothing is kept: FTADVISOR_CALIBRATION is empty.", *left_out)


def _weight_bits(
    asked: str | None, method: str, precision: Precision, knowledge: Knowledge
) -> Literal[4, 8, 16, 32]:
    """Bits of a stored weight: as asked, else as the method needs them, else by precision.

    Raises:
        UsageError: all weights are to be trained, and they are quantised.
    """
    bits: dict[str, Literal[4, 8, 16, 32]] = {"4": 4, "8": 8, "16": 16, "32": 32}
    if asked in ("4", "8") and method == "full":
        raise UsageError(
            f"--weight-bits {asked}: quantised weights cannot all be trained.",
            "--method qlora, or 16 or 32 bits",
        )
    if asked is not None:
        return bits[asked]
    own = knowledge.tuners.get(method)
    wide = precision == "fp32" or (own is not None and own.stored_bits == 32)
    return 4 if method == "qlora" else 32 if wide else 16


def _tuner(method: str, knowledge: Knowledge) -> dict[str, Any]:
    """Settings of a method: of its own counts, of what kb/ states of it, or of its group, which is said.

    Raises:
        UnknownNameError: nothing of that name is known.
    """
    own = knowledge.tuners.get(method)
    if own is not None:
        counted = estimated_as(method, own)
        sizes = {name: own.settings[name] for name in SIZES if name in own.settings}
        return {"tuner": counted, "stated": own.memory, "unknown": unknown_of(method, own), **sizes}
    stated = stated_tuner(method, knowledge.rules["tuners"])
    if stated is None and tuner_name(method) not in TUNERS:
        names = {*TUNERS, *ALIASES, *knowledge.tuners, *knowledge.rules["tuners"]}
        raise UnknownNameError("method", method, names, "ftadvisor explain tuners")
    return {"tuner": tuner_name(method), "stated": stated}


def _require_known(settings: MemorySettings, knowledge: Knowledge) -> None:
    """The closed form would take an unknown optimizer for AdamW and an unknown objective for SFT."""
    states = knowledge.rules["memory"]["optimizer"]["states"]
    if settings.optimizer not in states:
        raise UnknownNameError("optimizer", settings.optimizer, states, "ftadvisor explain optimizer")
    if settings.objective not in knowledge.objectives:
        raise UnknownNameError("objective", settings.objective, knowledge.objectives, "ftadvisor explain")


def _memory(spec: ModelSpec, settings: MemorySettings, engine: str, knowledge: Knowledge) -> MemoryEstimate:
    if engine == "closed_form":
        return estimate_memory(spec, settings, knowledge.rules["memory"])
    from advisor.run.traced import trace

    return trace(spec, settings, knowledge, own_cache_dir())


def _seconds(
    spec: ModelSpec, settings: MemorySettings, machine: Hardware, knowledge: Knowledge
) -> TimeEstimate | None:
    """Time of one step of full rows on `machine`; None where it has no device of the asked kind."""
    first = machine.accelerators[0] if machine.accelerators else None
    if settings.device == "cuda" and first is None:
        return None
    sequences = settings.micro_batch * settings.gpus
    return estimate_time(
        spec, settings, rows=sequences, epochs=1, effective_batch=sequences, max_steps=1,
        mean_tokens=settings.seq_len, lengths=None, hardware=machine, rules=knowledge.rules["time"],
        accelerator=knowledge.accelerators[first.kb_id] if first and first.kb_id else None,
    )  # fmt: skip
