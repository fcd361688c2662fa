"""Puts the person's own settings (`--set key=value`) over the advised ones, says so, and checks what they do.

Goes in: the settings of a stage and the overrides. Comes out: the settings obeyed, with the reason "set
by you", and words about values outside the range of the sources. Never does: refuse a value that is
merely unusual.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import msgspec

from advisor.errors import RefusedError, UnknownNameError, UsageError
from advisor.knowledge import Knowledge
from advisor.plan.learning_rate import rate_facts
from advisor.plan.settings import Sheet
from advisor.programs import check_value
from advisor.recommend.chains import REINFORCEMENT
from advisor.recommend.gates import Proposal, program_of
from advisor.recommend.reasons import because
from advisor.recommend.situation import rule
from advisor.types import MemorySettings, Objective, ProgramKey, StartFrom, Value

MEMORY_KEYS = {
    "micro_batch": "micro_batch", "lora_r": "lora_r", "gradient_checkpointing": "gradient_checkpointing",
    "optimizer": "optimizer", "precision": "precision", "weight_bits": "weight_bits", "loss": "loss",
    "attention": "attention", "packing": "packed", "double_quant": "double_quant", "target": "target",
    "num_generations": "generations", "virtual_tokens": "virtual_tokens", "bottleneck": "bottleneck",
    "bottleneck_style": "bottleneck_style", "preserved_share": "preserved_share",
}  # fmt: skip
"""Setting -> field of MemorySettings."""
MAY_BE_ZERO = frozenset(
    {
        "learning_rate", "heldout_fraction", "warmup_ratio", "weight_decay", "lora_dropout",
        "label_smoothing", "beta", "kl_beta", "sft_loss_weight", "replay_fraction", "gamma_beta_ratio",
    }
)  # fmt: skip
"""Where zero means `none of it`; any other number must be positive."""


NOT_BY_HAND = frozenset({"cpu_offload"})
"""Settings that only a plan can give: what they ask for is decided together with much else."""


def check_names(
    overrides: Mapping[str, Value],
    sheets: Mapping[Objective, Sheet],
    proposal: Proposal,
    knowledge: Knowledge,
    *,
    not_taken: str = "",
) -> None:
    """Refuse a setting that no stage has and no program of the plan would read; `not_taken` says why the
    objective that was asked for, and may have it, is none of them.

    Raises:
        UnknownNameError: with the nearest valid names.
    """
    names = {
        str(objective): {*sheet.settings, *_more_keys(objective, proposal, knowledge)}
        for objective, sheet in sheets.items()
    }
    known = {name for stage in names.values() for name in stage}
    for key in overrides:
        stage, _, name = key.rpartition(".")
        if stage and stage not in names:
            stages = "The stages of this plan: " + ", ".join(names)
            raise UnknownNameError("stage", stage, names, not_taken or stages)
        if name not in (names[stage] if stage else known):
            raise UnknownNameError("setting", name, known, not_taken or "ftadvisor explain topics")


def _more_keys(objective: Objective, proposal: Proposal, knowledge: Knowledge) -> dict[str, ProgramKey]:
    """Return what the program of a stage reads with this tuner, whether the advice says anything of it."""
    program = knowledge.programs.get(program_of(objective, proposal.facts, knowledge))
    keys = program.keys if program else {}
    return {
        name: facts
        for name, facts in keys.items()
        if name not in NOT_BY_HAND and (not facts.tuners or proposal.tuner in facts.tuners)
    }


def apply(
    sheet: Sheet,
    objective: Objective,
    proposal: Proposal,
    overrides: Mapping[str, Value],
    knowledge: Knowledge,
) -> list[str]:
    """Apply the overrides of one stage; return those outside the sourced range, in words.

    Raises:
        UsageError: a value that the setting cannot have, or two that do not go together.
        RefusedError: the tuner cannot do it.
    """
    strange: list[str] = []
    keys, chosen = _more_keys(objective, proposal, knowledge), set[str]()
    for key, value in sorted(overrides.items()):
        stage, _, name = key.rpartition(".")
        if (stage and stage != objective) or name not in {*sheet.settings, *keys}:
            continue
        advised = sheet.settings.get(name)
        value = _same_kind(name, value, advised) if advised is not None else _as_the_key(value, keys[name])
        if name in keys:
            check_value(name, value, keys[name], f"See: ftadvisor explain {name}")
        _refuse_silently_wrong(name, value, proposal)
        if words := _outside(name, value, objective, proposal, knowledge):
            strange.append(words)
        if advised is None:
            sheet.say(name, "by_hand", value=value)
        else:
            sheet.put(name, value, f"set by you; the advice was {advised}", sheet.why[name].source)
        chosen.add(name)
    _follow(sheet, chosen)
    return strange


def _refuse_silently_wrong(name: str, value: Value, proposal: Proposal) -> None:
    """Refuse what a tuner cannot do, or would do wrong without a word.

    Raises:
        RefusedError: with what stands in its way, and what to do instead.
    """
    facts = proposal.facts
    if name == "packing" and value is True and not facts.packing:
        raise RefusedError(
            f"packing does not go with {facts.title}: several rows in one sequence would share what each "
            "needs for itself.",
            "Leave --set packing=true away, or train with --method lora.",
        )
    if name == "gradient_checkpointing" and value is True and not facts.gradient_checkpointing:
        raise RefusedError(
            f"gradient_checkpointing does not go with {facts.title}: it hands its weights over in the cache.",
            "Leave --set gradient_checkpointing=true away, or train with --method lora.",
        )
    if name == "weight_bits" and (value == 4) != facts.quantised_base:
        raise RefusedError(
            f"weight_bits={value} does not go with {facts.title}: on a base of 4 bits only QLoRA is trained, "
            "and merged into the unquantised weights afterwards.",
            "Leave --set weight_bits away, or train with --method qlora.",
        )


def _as_the_key(value: Value, facts: ProgramKey) -> Value:
    """Return a value in the form of the key: one word for a list is a list, words with commas are several."""
    if facts.type == "list" and isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    if facts.type == "str" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    return value


def _follow(sheet: Sheet, chosen: Collection[str]) -> None:
    """Move what hangs on a batch that the person set, so that the program can still run.

    Raises:
        UsageError: both batches were set, and one is not a multiple of the other.
    """
    if "packing" in chosen:
        _pack_one_at_a_time(sheet, chosen)
    if "micro_batch" in chosen and "per_step_batch" in sheet.settings:
        sheet.say("per_step_batch", "per_step_batch", value=sheet.settings["micro_batch"])
    if not {"micro_batch", "effective_batch", "num_generations"} & set(chosen):
        return
    micro, effective, group = (
        value if isinstance(value := sheet.settings.get(name, 1), int) else 1
        for name in ("micro_batch", "effective_batch", "num_generations")
    )
    if effective % micro == 0 and effective % group == 0:
        return
    if "effective_batch" not in chosen:
        unit = math.lcm(micro, group)
        sheet.say("effective_batch", "batch_follows", value=max(1, round(effective / unit)) * unit)
    elif "micro_batch" not in chosen and effective % group == 0:
        largest = max(n for n in range(1, micro + 1) if effective % n == 0)
        sheet.say("micro_batch", "batch_follows", value=largest)
    else:
        raise UsageError(
            f"effective_batch {effective} is not a multiple of micro_batch {micro}"
            + (f" and of num_generations {group}." if group > 1 else "."),
            "Set them so that it is, or leave effective_batch away.",
        )


def _pack_one_at_a_time(sheet: Sheet, chosen: Collection[str]) -> None:
    """Without flash attention packed sequences are joined to one, which costs the square of its length.

    Raises:
        UsageError: more than one sequence at a time was set too.
    """
    settings = sheet.settings
    if not settings["packing"] or settings.get("attention") == "flash" or settings["micro_batch"] == 1:
        return
    if "micro_batch" in chosen:
        raise UsageError(
            f"packing with micro_batch {settings['micro_batch']} makes one sequence of all, which "
            "without flash attention costs the square of its length.",
            "Leave --set micro_batch away: one packed sequence at a time is full already.",
        )
    sheet.say("micro_batch", "one_packed", value=1)


def keep_shape(sheet: Sheet, start: StartFrom | None) -> dict[str, Value]:
    """Let an adapter that is trained further keep its shape; return the settings that say so."""
    shape = (
        {} if start is None else {name: start.shape[name] for name in start.shape if name in sheet.settings}
    )
    for name, value in shape.items():
        sheet.say(name, "kept_shape", value=value)
    return shape


def _same_kind(name: str, value: Value, advised: Value) -> Value:
    if isinstance(advised, bool) or isinstance(value, bool):
        if isinstance(advised, bool) and isinstance(value, bool):
            return value
        raise UsageError(
            f"{name}={value!r} is not of the right kind.", f"For example: --set {name}={advised}"
        )
    if isinstance(advised, int | float):
        if (
            isinstance(value, int | float)
            and value == value
            and (value > 0 or (name == "max_steps" and value == -1) or (value == 0 and name in MAY_BE_ZERO))
        ):
            if isinstance(advised, int) and name != "epochs" and float(value).is_integer():
                return int(value)
            return value
        raise UsageError(
            f"{name}={value!r} must be a positive number{' or -1' if name == 'max_steps' else ''}.",
            f"For example: --set {name}={advised}",
        )
    if isinstance(advised, str) and not isinstance(value, str | list):
        raise UsageError(f"{name}={value!r} must be a word.", f"For example: --set {name}={advised}")
    return value


def _outside(name: str, value: Value, objective: Objective, proposal: Proposal, knowledge: Knowledge) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if name == "learning_rate":
        facts = rate_facts(objective, proposal.facts.group, knowledge)
        low, high = facts.low, facts.high
        small = rule(knowledge, "settings", "learning_rate_change")
        scaled = proposal.facts.group in ("full", "lora")
        if scaled and proposal.spec.parameters < small["small_model_below"]:
            online = rule(knowledge, "settings", "learning_rate_reinforcement_small")
            high *= online["factor"] if objective in REINFORCEMENT else small["small_model_preference_factor"]
    else:
        ranges = rule(knowledge, "settings", "ranges")
        band = ranges.get(objective, {}).get(name) or ranges.get(name)
        if band is None or isinstance(band, dict):
            return ""
        low, high = band
    if low <= value <= high:
        return ""
    words = f"{objective}: {name} = {value:g}, sources use {low:g} to {high:g}"
    if name == "learning_rate" and value < low and proposal.facts.group not in ("full", "lora"):
        figures = {"title": proposal.facts.title, "rate": f"{low:g}"}
        return f"{words}; {because(knowledge, 'setting', 'rate_too_low', **figures).reason}"
    return words


def memory_with(settings: MemorySettings, sheet: Sheet, changed: Iterable[str]) -> MemorySettings:
    """The estimator's input with the overridden settings in it."""
    changes: dict[str, object] = {}
    # Whatever else was set, the rows in memory may have moved with it.
    names = {key.rpartition(".")[2] for key in changed} | {"micro_batch"}
    for name in names & MEMORY_KEYS.keys():
        if name in sheet.settings:
            changes[MEMORY_KEYS[name]] = sheet.settings[name]
    length = sheet.settings.get("max_seq_len")
    completion = sheet.settings.get("max_completion_length", 0)
    if (
        names & {"max_seq_len", "max_completion_length"}
        and isinstance(length, int)
        and isinstance(completion, int)
    ):
        changes["seq_len"] = length + completion
    try:
        return msgspec.convert({**msgspec.structs.asdict(settings), **changes}, type=MemorySettings)
    except msgspec.ValidationError as problem:
        raise UsageError(
            f"A setting has a value that does not exist: {problem}", "ftadvisor explain topics"
        ) from problem
