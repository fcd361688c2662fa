"""Which value does every setting of a stage get, why, and from which source?

Goes in: a stage that fits, and the case. Comes out: settings and their reasons, always in pairs.
Never does: choose the method; leave a setting without a reason.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.plan.learning_rate import learning_rate
from advisor.recommend import Advice, Option
from advisor.recommend.amount import batch_for, epochs_for, heldout_share, stage_time
from advisor.recommend.chains import PREFERENCE, REINFORCEMENT
from advisor.recommend.fit import Fit, StageFit
from advisor.recommend.reasons import because
from advisor.recommend.situation import (
    DEMONSTRATIONS,
    TEXT,
    Situation,
    counted_rows,
    datasets_of,
    rule,
    unequal_ratio,
)
from advisor.types import DatasetProfile, TimeEstimate, Value, Why
from advisor.units import format_bytes


class Sheet:
    """Settings under construction: a value never comes without its reason and source."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self.settings: dict[str, Value] = {}
        self.why: dict[str, Why] = {}

    def put(self, name: str, value: Value, reason: str, source: str) -> None:
        """Add or replace one setting."""
        self.settings[name] = value
        self.why[name] = Why(reason=reason, source=source)

    def say(self, name: str, key: str, /, *, value: Value, **figures: object) -> None:
        """Add or replace one setting with a sentence of kb/rules/reasons.toml."""
        why = because(self.knowledge, "setting", key, **figures)
        self.put(name, value, why.reason, why.source)


def stage_sheet(
    stage: StageFit, option: Option, advice: Advice, fit: Fit, knowledge: Knowledge
) -> tuple[Sheet, TimeEstimate]:
    """Return all settings of one stage, and how long it takes with them."""
    sheet = Sheet(knowledge)
    _pace(sheet, stage, option, fit, advice, knowledge)
    _length(sheet, stage)
    _optimiser(sheet, stage, option, advice, knowledge)
    _machine(sheet, stage, option, fit, advice)
    _loss(sheet, stage, option)
    _tuner(sheet, stage, option, advice, knowledge)
    _objective(sheet, stage, advice, knowledge)
    _mixture(sheet, stage, option, advice, knowledge)
    time = stage_time(
        stage, option.proposal, advice.situation, knowledge, epochs=_number(sheet, "epochs"),
        effective_batch=round(_number(sheet, "effective_batch")),
    )  # fmt: skip
    _keeping(sheet, stage, time, advice, knowledge)
    return sheet, time


def _number(sheet: Sheet, name: str) -> float:
    value = sheet.settings[name]
    return float(value) if isinstance(value, int | float) else 0.0


def _pace(
    sheet: Sheet, stage: StageFit, option: Option, fit: Fit, advice: Advice, knowledge: Knowledge
) -> None:
    situation, proposal = advice.situation, option.proposal
    sheet.put("learning_rate", *learning_rate(stage.objective, proposal, situation, knowledge))
    epochs, why = epochs_for(stage.objective, proposal, situation, knowledge)
    sheet.put("epochs", epochs, why, rule(knowledge, "settings", "epochs")["source"])
    sheet.say("max_steps", "max_steps", value=-1)
    micro, effective, why, source = batch_for(stage.objective, proposal, stage, situation, knowledge)
    sheet.say(
        "micro_batch", "micro_batch_offload" if fit.layout.offload else "micro_batch", value=micro,
        peak=format_bytes(stage.estimate.peak_bytes.high), free=format_bytes(situation.machine.free_bytes),
        tokens=f"{stage.settings.seq_len:,}",
    )  # fmt: skip
    sheet.put("effective_batch", effective, why, source)


def _length(sheet: Sheet, stage: StageFit) -> None:
    key = "max_seq_len_shortened" if stage.shortened else "max_seq_len"
    length = stage.settings.seq_len - stage.completion_tokens
    sheet.say("max_seq_len", key, value=length, said=stage.lengths.said)


def _optimiser(sheet: Sheet, stage: StageFit, option: Option, advice: Advice, knowledge: Knowledge) -> None:
    warmup, rules = rule(knowledge, "settings", "warmup"), rule(knowledge, "settings", "regularisation")
    later, online = stage.objective in PREFERENCE, stage.objective in REINFORCEMENT
    share = warmup["preference"] if later else warmup["default"]
    key = "warmup_ratio_preference" if later else "warmup_ratio"
    sheet.say("warmup_ratio", key, value=share, share=f"{share:.0%}")
    scheduler = "constant" if online else "linear" if later else "cosine"
    sheet.say("scheduler", f"scheduler_{scheduler}", value=scheduler)
    key = "weight_decay_small" if _small(stage, advice, knowledge) else "weight_decay"
    sheet.say("weight_decay", key, value=rules[key])
    key = "max_grad_norm_fp16" if stage.settings.precision == "fp16" else "max_grad_norm"
    sheet.say("max_grad_norm", key, value=rules[key])
    key = "optimizer" if option.proposal.facts.group != "full" else "optimizer_full"
    key = "optimizer_light" if stage.settings.optimizer != "adamw_torch" else key
    sheet.say("optimizer", key, value=stage.settings.optimizer)


def _small(stage: StageFit, advice: Advice, knowledge: Knowledge) -> bool:
    rows = counted_rows(stage.objective, advice.situation, knowledge)
    return stage.objective == "sft" and rows < rule(knowledge, "data", "rows")["small_below"]


def _machine(sheet: Sheet, stage: StageFit, option: Option, fit: Fit, advice: Advice) -> None:
    settings, facts = stage.settings, option.proposal.facts
    device = advice.situation.machine.name
    sheet.say("precision", f"precision_{settings.precision}", value=settings.precision, device=device)
    sheet.say("weight_bits", f"weight_bits_{settings.weight_bits}", value=settings.weight_bits)
    if settings.weight_bits == 4:
        sheet.say("double_quant", "double_quant", value=True)
    on = settings.gradient_checkpointing
    key = "on" if on else "off" if facts.gradient_checkpointing else "never"
    sheet.say("gradient_checkpointing", f"gradient_checkpointing_{key}", value=on)
    off = "mixed" if advice.situation.mixes else "off"
    key = "on" if settings.packed else off if facts.packing else "never"
    sheet.say("packing", f"packing_{key}", value=settings.packed)
    key = "attention_eager" if settings.attention == "eager" else "attention"
    sheet.say("attention", key, value=settings.attention)
    if fit.layout.offload:
        sheet.say("cpu_offload", "cpu_offload", value=True)


def _loss(sheet: Sheet, stage: StageFit, option: Option) -> None:
    if option.proposal.tuner == "classifier_head":
        return
    sheet.say("loss", f"loss_{stage.settings.loss}", value=stage.settings.loss)
    if stage.objective in ("cpt", "sft"):
        on = "all" if stage.objective == "cpt" else "assistant"
        sheet.say("loss_on", f"loss_on_{on}", value=on)


def _tuner(sheet: Sheet, stage: StageFit, option: Option, advice: Advice, knowledge: Knowledge) -> None:
    facts = option.proposal.facts
    for name, value in facts.settings.items():
        if name in ("double_quant", "lora_r", "lora_alpha", "use_rslora", "lora_dropout"):
            continue
        if value == "all-linear":
            sheet.say(name, "all_linear", value=value)
        else:
            key = name if name in knowledge.rules["reasons"]["setting"] else "tuner_usual"
            sheet.say(name, key, value=value, title=facts.title)
    if not stage.rank:
        return
    rules = rule(knowledge, "settings", "rank")
    rows = counted_rows(stage.objective, advice.situation, knowledge)
    sheet.say("lora_r", _rank_key(stage, advice), value=stage.rank, rows=f"{rows:,}")
    factor = rules["alpha_over_rank"]
    sheet.say("lora_alpha", "lora_alpha", value=round(stage.rank * factor), factor=f"{factor:g}")
    if facts.group != "lora":
        return
    dropout, small = rule(knowledge, "settings", "dropout"), _small(stage, advice, knowledge)
    key = "lora_dropout_small" if small else "lora_dropout"
    sheet.say("lora_dropout", key, value=dropout["small_data" if small else "default"])
    stable = stage.rank >= rules["rslora_from"]
    key = "use_rslora_on" if stable else "use_rslora_off"
    sheet.say("use_rslora", key, value=stable, rank=rules["rslora_from"])


def _rank_key(stage: StageFit, advice: Advice) -> str:
    if advice.situation.scenario.goal.storage_per_task_kb is not None:
        return "lora_r_storage"
    if stage.objective in REINFORCEMENT:
        return "lora_r_reinforcement"
    return "lora_r_pretraining" if stage.objective == "cpt" else "lora_r"


def _objective(sheet: Sheet, stage: StageFit, advice: Advice, knowledge: Knowledge) -> None:
    facts, pairs = knowledge.objectives[stage.objective], advice.situation.pairs
    for name, value in facts.settings.items():
        if name not in ("loss_on", "packing", "max_completion_length", "per_step_batch"):
            sheet.put(name, value, f"the usual value for {facts.title}", facts.source)
    if stage.completion_tokens:
        sheet.say("max_completion_length", "max_completion_length", value=stage.completion_tokens)
    if stage.objective == "kto":
        _thumbs(sheet, stage, advice)
    similar = rule(knowledge, "data", "defects")["similarity_warn"]
    if stage.objective == "dpo" and any((d.pair_similarity or 0) >= similar for d in pairs):
        labels = rule(knowledge, "settings", "labels")
        sheet.say("sft_loss_weight", "sft_loss_weight", value=labels["sft_loss_weight"])
        sheet.say("beta", "beta_similar", value=labels["similar_beta"])


def _thumbs(sheet: Sheet, stage: StageFit, advice: Advice) -> None:
    sheet.say("per_step_batch", "per_step_batch", value=stage.settings.micro_batch)
    shares = [d.positive_fraction for d in advice.situation.unpaired if d.positive_fraction is not None]
    share = sum(shares) / len(shares) if shares else 0.5
    if share in (0.0, 1.0):
        return  # no weight balances labels that are all the same
    share = min(max(share, 0.01), 0.99)
    name = "undesirable_over_desirable_weight"
    sheet.say(name, name, value=round(share / (1 - share), 2), share=f"{share:.0%}")


def _mixture(sheet: Sheet, stage: StageFit, option: Option, advice: Advice, knowledge: Knowledge) -> None:
    situation, answers = advice.situation, option.proposal.tuner != "classifier_head"
    share, key = replay(stage.objective, situation, knowledge)
    if share and answers:
        sheet.say("replay_fraction", key, value=share, share=f"{share:.0%}")
    if stage.objective == "sft" and situation.tasks > 1 and answers:
        rules = rule(knowledge, "data", "mixture")
        if unequal_ratio(situation) >= rules["unequal_ratio"]:
            sheet.say("mixing_cap", "mixing_cap", value=rules["cap_rows"])
        sheet.say("mixing_temperature", "mixing_temperature", value=rules["temperature"])
    if situation.tenants > 1:
        sheet.say("same_rank_for_all", "same_rank_for_all", value=True)


def replay(objective: str, situation: Situation, knowledge: Knowledge) -> tuple[float, str]:
    """(share of old or general data to mix in, key of its reason); 0 without old data to take it from."""
    rules = rule(knowledge, "data", "replay")
    if not replayed(objective, situation):
        return 0.0, ""
    if objective == "sft":
        key = "earlier_task"
    else:
        key = "new_language" if new_language(situation, knowledge) else "same_language"
    return float(rules[key]), f"replay_{key}"


def replayed(objective: str, situation: Situation) -> tuple[DatasetProfile, ...]:
    """Earlier datasets that a stage can mix in: answers to imitate, and text too where text is read."""
    kinds = {"sft": DEMONSTRATIONS, "cpt": DEMONSTRATIONS | TEXT}.get(objective, frozenset())
    return tuple(d for d in situation.earlier if d.kind in kinds)


def new_language(situation: Situation, knowledge: Knowledge) -> bool:
    """True when the text is in a language that models know little, by the wish or by its script."""
    costly = set(rule(knowledge, "data", "languages")["costly"])
    spoken = {code.lower() for d in situation.texts for code in d.languages}
    return situation.wish("new_language") or bool(spoken & costly)


def _keeping(sheet: Sheet, stage: StageFit, time: TimeEstimate, advice: Advice, knowledge: Knowledge) -> None:
    points = rule(knowledge, "settings", "checkpoints")
    datasets = datasets_of(stage.objective, advice.situation)
    share = heldout_share(stage.objective, advice.situation, knowledge)
    key = "heldout" if share else "heldout_none"
    if any(d.holdout_rows for d in datasets):
        key = "heldout_own"
    sheet.say("heldout_fraction", key, value=share)
    wanted = round(time.steps / points["saves_per_run"])
    every = max(points["every_at_least"], min(points["every_at_most"], wanted))
    figures = {"times": points["saves_per_run"], "steps": f"{time.steps:,}"}
    sheet.say("save_every_steps", "save_every_steps", value=every, **figures)
    sheet.say("keep_checkpoints", "keep_checkpoints", value=points["keep"])
    sheet.say("report_to", "report_to", value="none")
