"""`ftadvisor estimate`: the memory of one training step, without weights, GPU or torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import typer

from advisor.cli.options import Json, Model, Offline, inputs_of
from advisor.cli.output import print_json, print_text
from advisor.estimate.memory import estimate_memory
from advisor.intake import model_spec
from advisor.knowledge import load
from advisor.types import Band, MemorySettings, Part

app = typer.Typer(rich_markup_mode=None, add_completion=False)


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
    notes: tuple[str, ...]


@app.command()
def estimate(
    model: Model = "auto",
    method: Annotated[str, typer.Option("--method", help="full, lora, qlora, ia3, ...")] = "lora",
    objective: Annotated[str, typer.Option("--objective", help="sft, dpo, kto, reward, grpo, ...")] = "sft",
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1)] = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens of the longest row.")] = 2048,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing")
    ] = True,
    precision: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option("--precision")] = "bf16",
    optimizer: Annotated[str, typer.Option("--optimizer")] = "adamw_torch",
    lora_r: Annotated[int, typer.Option("--lora-r", min=1)] = 16,
    target: Annotated[
        str, typer.Option("--target", help="all-linear, attention, q_v, mlp or module names.")
    ] = "all-linear",
    attention: Annotated[Literal["flash", "sdpa", "eager"], typer.Option("--attention")] = "sdpa",
    loss: Annotated[Literal["full_logits", "chunked"], typer.Option("--loss")] = "chunked",
    gpus: Annotated[int, typer.Option("--gpus", min=1)] = 1,
    shard: Annotated[Literal["none", "fsdp", "zero3"], typer.Option("--shard")] = "none",
    device: Annotated[Literal["cuda", "cpu"], typer.Option("--device")] = "cuda",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Predict the memory of one training step; a config.json is enough, no weights are read."""
    knowledge = load()
    spec = model_spec(inputs_of(model=model, offline=offline), knowledge)
    settings = MemorySettings(
        tuner=method.replace("_", "-"),
        objective=objective,
        precision=precision,
        weight_bits=4 if method == "qlora" else 32 if precision == "fp32" else 16,
        micro_batch=micro_batch,
        seq_len=seq_len,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        lora_r=lora_r,
        target=target,
        attention=attention,
        loss=loss,
        gpus=gpus,
        shard=shard,
        device=device,
    )
    found = estimate_memory(spec, settings, knowledge.rules["memory"])
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
        seconds_per_step=None,
        notes=found.notes,
    )
    if as_json:
        print_json(answer)
        return
    from advisor.ui.render import estimate as draw

    print_text(draw(spec, found))
