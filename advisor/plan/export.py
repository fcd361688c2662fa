"""Does the result become a file that runs where it must, by which route and in which quantisation?

Goes in: the chosen model and tuner, and the wish. Comes out: ExportPlan. Never does: write a file.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.recommend.deploy import choose_file
from advisor.recommend.situation import Situation, rule
from advisor.types import ExportPlan, ModelSpec, TunerFacts


def export_plan(
    spec: ModelSpec, tuner: TunerFacts | None, situation: Situation, knowledge: Knowledge
) -> ExportPlan:
    """Plan the export of a model tuned by `tuner` (None: exported as it is)."""
    if situation.goal.deploy != "unstated" and not situation.goal.wants_gguf:
        return _for_a_server(spec, tuner, situation)
    choice = choose_file(spec, situation, knowledge)
    if tuner is not None and tuner.gguf == "none":
        return ExportPlan(
            feasible=False, format="gguf", route="merged", quant=choice.quant, file_bytes=0,
            reason=f"it cannot become a GGUF: {tuner.gguf_note}",
        )  # fmt: skip
    if spec.gguf_architecture is None:
        return ExportPlan(
            feasible=False, format="gguf", route="merged", quant=choice.quant, file_bytes=0,
            reason=f"llama.cpp has no architecture for {spec.model_type}",
        )  # fmt: skip
    if spec.gguf_obstacle:
        return ExportPlan(
            feasible=False, format="gguf", route="merged", quant=choice.quant, file_bytes=0,
            reason=spec.gguf_obstacle.rstrip("."),
        )  # fmt: skip
    if tuner is not None and tuner.gguf == "sequence_state":
        named = (
            situation.goal.phrases.get("deploy:offline", "") in rule(knowledge, "deploy", "offline")["alone"]
        )
        return ExportPlan(
            feasible=choice.fits and not named, format="gguf", route="prefix_state", quant=choice.quant,
            file_bytes=choice.file_bytes, reason=f"{tuner.gguf_note}; {choice.quant}: {choice.reason}",
        )  # fmt: skip
    route, why = _route(tuner, situation)
    return ExportPlan(
        feasible=choice.fits, format="gguf", route=route, quant=choice.quant, file_bytes=choice.file_bytes,
        reason=f"{why}; {choice.quant}: {choice.reason}",
    )  # fmt: skip


def _for_a_server(spec: ModelSpec, tuner: TunerFacts | None, situation: Situation) -> ExportPlan:
    """Inference servers load safetensors: the merged model, or the base with an adapter for each tenant."""
    apart = situation.separate or situation.wish("adapter")
    if tuner is not None and tuner.group == "lora" and apart:
        return ExportPlan(
            feasible=True, format="safetensors", route="adapter", quant="BF16", file_bytes=0,
            reason="the adapter folder of the run is served beside the base, each request naming its adapter",
        )  # fmt: skip
    if tuner is not None and not tuner.mergeable and tuner.group != "full":
        return ExportPlan(
            feasible=False, format="safetensors", route="merged", quant="BF16", file_bytes=0,
            reason="this method does not merge into the base, and servers load no such adapters",
        )  # fmt: skip
    return ExportPlan(
        feasible=True, format="safetensors", route="merged", quant="BF16", file_bytes=2 * spec.parameters,
        reason="servers load 16-bit safetensors; a GGUF stays possible: ftadvisor export RUN_DIR --to gguf",
    )  # fmt: skip


def _route(tuner: TunerFacts | None, situation: Situation) -> tuple[str, str]:
    keeps = situation.tenants > 1 or situation.wish("tenants")
    if tuner is not None and tuner.gguf == "merged_or_lora" and keeps:
        return "lora_gguf", "adapters stay apart, one for each tenant, on one base file"
    if tuner is not None and tuner.gguf == "merged_or_lora" and situation.wish("adapter"):
        return (
            "lora_gguf",
            "the adapter was asked for as a file of its own; a merged file can be made as well",
        )
    if tuner is not None and tuner.gguf == "virtual_tokens":
        return "merged", "the virtual tokens are appended to the vocabulary"
    return "merged", "merged into the 16-bit weights, then quantised"
