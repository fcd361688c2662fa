"""Which value does every setting of a stage get, why, and from which source?

Goes in: a stage that fits, and the case. Comes out: settings and their reasons, always in pairs.
Never does: choose the method; leave a setting without a reason.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.plan.learning_rate import learning_rate
from advisor.recommend import Advice, Option
from advisor.recommend.amount import batch_for, epochs_for, stage_time
from advisor.recommend.chains import PREFERENCE, REINFORCEMENT
from advisor.recommend.fit import Fit, StageFit, datasets_of
from advisor.recommend.situation import Situation, rows_of, rule, unequal_ratio
from advisor.types import TimeEstimate, Value, Why
from advisor.units import format_bytes


class Sheet:
    """Settings under construction: a value never comes without its reason and source."""

    def __init__(self) -> None:
        self.settings: dict[str, Value] = {}
        self.why: dict[str, Why] = {}

    def put(self, name: str, value: Value, reason: str, source: str) -> None:
        """Add or replace one setting."""
        self.settings[name] = value
        self.why[name] = Why(reason=reason, source=source)


def stage_sheet(
    stage: StageFit, option: Option, advice: Advice, fit: Fit, knowledge: Knowledge
) -> tuple[Sheet, TimeEstimate]:
    """Return all settings of one stage, and how long it takes with them."""
    sheet = Sheet()
    _pace(sheet, stage, option, advice, knowledge)
    _length(sheet, stage)
    _optimiser(sheet, stage, advice, knowledge)
    _machine(sheet, stage, option, fit, advice, knowledge)
    _loss(sheet, stage, option)
    _tuner(sheet, stage, option, advice, knowledge)
    _objective(sheet, stage, advice, knowledge)
    _mixture(sheet, stage, advice, knowledge)
    time = stage_time(
        stage, option.proposal, advice.situation, knowledge, epochs=_number(sheet, "epochs"),
        effective_batch=round(_number(sheet, "effective_batch")),
    )  # fmt: skip
    _keeping(sheet, stage, time, advice, knowledge)
    return sheet, time


def _number(sheet: Sheet, name: str) -> float:
    value = sheet.settings[name]
    return float(value) if isinstance(value, int | float) else 0.0


def _pace(sheet: Sheet, stage: StageFit, option: Option, advice: Advice, knowledge: Knowledge) -> None:
    situation, proposal = advice.situation, option.proposal
    rate, why, source = learning_rate(stage.objective, proposal, situation, knowledge)
    sheet.put("learning_rate", rate, why, source)
    epochs, why = epochs_for(stage.objective, proposal, situation, knowledge)
    sheet.put("epochs", epochs, why, rule(knowledge, "settings", "epochs")["source"])
    sheet.put("max_steps", -1, "the number of steps follows from rows, epochs and batch", "judgement")
    micro, effective, why, source = batch_for(stage.objective, proposal, stage, situation, knowledge)
    high, free = stage.estimate.peak_bytes.high, situation.machine.free_bytes
    reason = (
        f"at most {format_bytes(high)} of {format_bytes(free)} at {stage.settings.seq_len:,} tokens; "
        "rows enough to keep the device busy, no more"
    )
    sheet.put("micro_batch", micro, reason, "performance-lab")
    sheet.put("effective_batch", effective, why, source)


def _length(sheet: Sheet, stage: StageFit) -> None:
    length = stage.settings.seq_len - stage.completion_tokens
    reason = stage.lengths.said
    if stage.shortened:
        reason += "; shortened so that it fits the memory"
    sheet.put("max_seq_len", length, reason, "judgement")


def _optimiser(sheet: Sheet, stage: StageFit, advice: Advice, knowledge: Knowledge) -> None:
    warmup, rules = rule(knowledge, "settings", "warmup"), rule(knowledge, "settings", "regularisation")
    later = stage.objective in PREFERENCE
    share = warmup["preference"] if later else warmup["default"]
    sheet.put(
        "warmup_ratio", share, f"the rate rises over the first {share:.0%} of the steps", warmup["source"]
    )
    if stage.objective in REINFORCEMENT:
        sheet.put("scheduler", "constant", "rewards keep moving, so the rate stays", "trl-peft-guide")
    elif later:
        sheet.put("scheduler", "linear", "falls evenly to zero", "alignment-handbook")
    else:
        sheet.put("scheduler", "cosine", "falls smoothly to zero", "llama-factory-examples")
    small = _small(stage, advice, knowledge)
    decay = rules["weight_decay_small_data"] if small else rules["weight_decay"]
    reason = "a little, against learning few rows by heart" if small else "most published recipes use none"
    sheet.put("weight_decay", decay, reason, rules["source"])
    fp16 = stage.settings.precision == "fp16"
    norm = rules["max_grad_norm_fp16"] if fp16 else rules["max_grad_norm"]
    reason = "strict, because fp16 overflows easily" if fp16 else "cuts off rare large gradients"
    sheet.put("max_grad_norm", norm, reason, "qlora-repo" if fp16 else rules["source"])
    light = stage.settings.optimizer != "adamw_torch"
    reason = (
        "its moments take a byte each, so that it fits"
        if light
        else "the reference; adapters leave it little to store"
    )
    sheet.put("optimizer", stage.settings.optimizer, reason, "performance-lab")


def _small(stage: StageFit, advice: Advice, knowledge: Knowledge) -> bool:
    rows = rows_of(datasets_of(stage.objective, advice.situation))
    return stage.objective == "sft" and rows < rule(knowledge, "data", "rows")["small_below"]


def _machine(
    sheet: Sheet, stage: StageFit, option: Option, fit: Fit, advice: Advice, knowledge: Knowledge
) -> None:
    settings, machine = stage.settings, advice.situation.machine
    reasons = {
        "bf16": f"{machine.name} computes in bf16: half the memory, no overflow",
        "fp16": f"{machine.name} has no bf16, so fp16 with loss scaling",
        "fp32": f"{machine.name} has no usable 16-bit format for this model",
    }
    sheet.put("precision", settings.precision, reasons[settings.precision], "axolotl-platforms")
    bits = {
        4: "the frozen weights are stored in 4 bits (NF4) so that they fit",
        16: "16 bits hold what the model was published in",
        32: "trained weights are kept in 32 bits, so that small updates are not lost",
    }
    reason = bits.get(settings.weight_bits, "as the method needs")
    sheet.put(
        "weight_bits",
        settings.weight_bits,
        reason,
        "qlora-repo" if settings.weight_bits == 4 else "method-lab",
    )
    if settings.weight_bits == 4:
        sheet.put("double_quant", True, "saves another 0.4 bits a weight at no loss", "qlora-repo")
    if settings.gradient_checkpointing:
        reason = "recomputes activations instead of storing them: about 30% slower, far less memory"
    elif not option.proposal.facts.gradient_checkpointing:
        reason = "this method does not work with it"
    else:
        reason = "everything fits without recomputing, which is faster"
    sheet.put("gradient_checkpointing", settings.gradient_checkpointing, reason, "axolotl-stability")
    if settings.packed:
        reason = "short rows are joined, so that no computation goes into padding"
    elif not option.proposal.facts.packing:
        reason = "this method gives wrong results with packed rows"
    else:
        reason = "packing needs a variable-length attention kernel; without one rows would see each other"
    sheet.put("packing", settings.packed, reason, "method-lab")
    sheet.put(
        "attention",
        settings.attention,
        "part of PyTorch, picks the fastest kernel of the device",
        "performance-lab",
    )
    if fit.layout.offload:
        sheet.put("cpu_offload", True, "optimiser states wait in the host's memory", "fsdp-qlora")


def _loss(sheet: Sheet, stage: StageFit, option: Option) -> None:
    if option.proposal.tuner == "classifier_head":
        return
    sheet.put(
        "loss", stage.settings.loss, "the logits of all tokens are never held at once", "performance-lab"
    )
    if stage.objective == "cpt":
        sheet.put("loss_on", "all", "plain text has no question to leave out", "wshobson-agents")
    elif stage.objective == "sft":
        sheet.put(
            "loss_on", "assistant", "the model shall learn the answers, not the questions", "trl-sft-docs"
        )


def _tuner(sheet: Sheet, stage: StageFit, option: Option, advice: Advice, knowledge: Knowledge) -> None:
    facts = option.proposal.facts
    for name, value in facts.settings.items():
        if name in ("double_quant", "lora_r", "lora_alpha", "use_rslora", "lora_dropout"):
            continue
        reason = (
            "every linear layer: adapters on attention alone learn less"
            if name == "target" and value == "all-linear"
            else f"usual for {facts.title}"
        )
        sheet.put(name, value, reason, "lora-without-regret" if facts.group == "lora" else facts.source)
    if not stage.rank:
        return
    rules = rule(knowledge, "settings", "rank")
    sheet.put("lora_r", stage.rank, _rank_reason(stage, advice), rules["source"])
    alpha = round(stage.rank * rules["alpha_over_rank"])
    sheet.put("lora_alpha", alpha, f"{rules['alpha_over_rank']:.0f} times the rank", "torchtune-readme")
    if facts.group != "lora":
        return
    dropout = rule(knowledge, "settings", "dropout")
    small = _small(stage, advice, knowledge)
    value = dropout["small_data"] if small else dropout["default"]
    reason = "a little, against learning few rows by heart" if small else "not needed with enough rows"
    sheet.put("lora_dropout", value, reason, dropout["source"])
    stable = stage.rank >= rules["rslora_from"]
    reason = (
        "keeps high ranks from learning too slowly (+3.9 points at rank 64)"
        if stable
        else "only matters from rank 64 on"
    )
    sheet.put("use_rslora", stable, reason, "peft-benchmark")


def _rank_reason(stage: StageFit, advice: Advice) -> str:
    rows = rows_of(datasets_of(stage.objective, advice.situation))
    if advice.situation.scenario.goal.storage_per_task_kb is not None:
        return "the largest that the storage for a task allows"
    if stage.objective in REINFORCEMENT:
        return "reinforcement tells the model little per answer; small ranks suffice"
    if stage.objective == "cpt":
        return "reading on needs room for what is new"
    return f"room enough for {rows:,} rows; the learning rate matters more than the rank"


def _objective(sheet: Sheet, stage: StageFit, advice: Advice, knowledge: Knowledge) -> None:
    facts = knowledge.objectives[stage.objective]
    for name, value in facts.settings.items():
        if name not in ("loss_on", "packing", "max_completion_length", "per_step_batch"):
            sheet.put(name, value, f"the usual value for {facts.title}", facts.source)
    if stage.completion_tokens:
        reason = "room for an answer with its working; longer ones are cut and earn nothing"
        sheet.put("max_completion_length", stage.completion_tokens, reason, facts.source)
    if stage.objective == "kto":
        _thumbs(sheet, stage, advice)
    similar = rule(knowledge, "data", "defects")["similarity_warn"]
    if stage.objective == "dpo" and any((d.pair_similarity or 0) >= similar for d in advice.situation.pairs):
        labels = rule(knowledge, "settings", "labels")
        reason = "the pairs hardly differ: a share of SFT loss keeps the better answer likely"
        sheet.put("sft_loss_weight", labels["sft_loss_weight"], reason, labels["source"])
        reason = "a stronger tie to the start, because the pairs hardly differ"
        sheet.put("beta", labels["similar_beta"], reason, labels["source"])


def _thumbs(sheet: Sheet, stage: StageFit, advice: Advice) -> None:
    reason = "the KL estimate needs several rows in each device batch"
    sheet.put("per_step_batch", stage.settings.micro_batch, reason, "trl-kto-docs")
    shares = [d.positive_fraction for d in advice.situation.unpaired if d.positive_fraction is not None]
    share = sum(shares) / len(shares) if shares else 0.5
    weight = round(min(max(share, 0.01), 0.99) / (1 - min(max(share, 0.01), 0.99)), 2)
    reason = f"{share:.0%} of the labels are positive; the weight makes both sides count alike"
    sheet.put("undesirable_over_desirable_weight", weight, reason, "trl-kto-docs")


def _mixture(sheet: Sheet, stage: StageFit, advice: Advice, knowledge: Knowledge) -> None:
    situation = advice.situation
    share, reason, source = replay(stage.objective, situation, knowledge)
    if share:
        sheet.put("replay_fraction", share, reason, source)
    if stage.objective == "sft" and situation.tasks > 1:
        rules = rule(knowledge, "data", "mixture")
        if unequal_ratio(situation) >= rules["unequal_ratio"]:
            reason = (
                "tasks count by their size up to this many rows, so that large ones do not drown small ones"
            )
            sheet.put("mixing_cap", rules["cap_rows"], reason, rules["source"])
        sheet.put(
            "mixing_temperature",
            rules["temperature"],
            "small tasks are seen more often than their share",
            "t5-mixing",
        )
    if situation.tenants > 1:
        sheet.put(
            "same_rank_for_all", True, "adapters of one rank can be served together on one base", "vllm-docs"
        )
    if stage.objective == "cpt" and stage.rank and new_language(situation, knowledge):
        rules = rule(knowledge, "settings", "embeddings")
        rate = _number(sheet, "learning_rate") * rules["learning_rate_factor"]
        sheet.put("train_embeddings", True, "words of a new language need new vectors", rules["source"])
        sheet.put(
            "embedding_learning_rate",
            float(f"{rate:.2g}"),
            "a tenth of the rate of the rest",
            rules["source"],
        )


def replay(objective: str, situation: Situation, knowledge: Knowledge) -> tuple[float, str, str]:
    """(share of old or general data to mix in, why, source); 0 when none is needed."""
    rules = rule(knowledge, "data", "replay")
    if objective == "cpt":
        if new_language(situation, knowledge):
            return rules["new_language"], "a new language shifts the model strongly", "ibrahim-2024"
        return rules["same_language"], "a little general text holds what was known", "ibrahim-2024"
    if objective != "sft":
        return 0.0, "", ""
    if situation.earlier:
        share = rules["earlier_task"]
        return (
            share,
            f"{share:.0%} of rows from every earlier task kept them at 99% in our runs",
            rules["source"],
        )
    if situation.wish("must_not_forget"):
        return rules["general"], "general data mixed in, because nothing may be forgotten", "wshobson-agents"
    return 0.0, "", ""


def new_language(situation: Situation, knowledge: Knowledge) -> bool:
    """True when the text is in a language that models know little, by the wish or by its script."""
    costly = set(rule(knowledge, "data", "languages")["costly"])
    spoken = {code.lower() for d in situation.texts for code in d.languages}
    return situation.wish("new_language") or bool(spoken & costly)


def _keeping(sheet: Sheet, stage: StageFit, time: TimeEstimate, advice: Advice, knowledge: Knowledge) -> None:
    rules, points = rule(knowledge, "settings", "heldout"), rule(knowledge, "settings", "checkpoints")
    datasets = datasets_of(stage.objective, advice.situation)
    rows = rows_of(datasets)
    if any(d.holdout_rows for d in datasets):
        sheet.put("heldout_fraction", 0.0, "you keep rows apart already", rules["source"])
    elif stage.objective in REINFORCEMENT or rows < rules["none_below"]:
        sheet.put("heldout_fraction", 0.0, "nothing can be spared", rules["source"])
    else:
        share = rules["fraction_small"] if rows < rules["small_below"] else rules["fraction"]
        share = min(share, round(rules["most_rows"] / max(rows, 1), 4))
        sheet.put(
            "heldout_fraction",
            share,
            "rows that are not trained on show whether it learned or memorised",
            rules["source"],
        )
    every = max(
        points["every_at_least"], min(points["every_at_most"], round(time.steps / points["saves_per_run"]))
    )
    sheet.put(
        "save_every_steps",
        every,
        f"about {points['saves_per_run']} times in {time.steps:,} steps",
        points["source"],
    )
    sheet.put("keep_checkpoints", points["keep"], "the newest and one to fall back to", points["source"])
