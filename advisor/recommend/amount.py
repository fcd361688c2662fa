"""How many passes over the data, in which batches, and how long does that take?

Goes in: a Proposal that fits, and the Situation. Comes out: epochs, batch sizes, packing, a TimeEstimate.
Never does: judge whether the time is acceptable.
"""

from __future__ import annotations

import math

from advisor.estimate.time import estimate_time, mean_length
from advisor.knowledge import Knowledge
from advisor.recommend.chains import PREFERENCE, REINFORCEMENT
from advisor.recommend.fit import Fit, StageFit
from advisor.recommend.gates import Proposal
from advisor.recommend.situation import Situation, counted_rows, datasets_of, megabytes_of, rule
from advisor.types import Histogram, Objective, TimeEstimate


def stage_rows(objective: Objective, situation: Situation, knowledge: Knowledge, seq_len: int) -> int:
    """Training rows of a stage; plain text counts in pieces of the sequence length."""
    if objective != "cpt":
        return counted_rows(objective, situation, knowledge)
    each = float(rule(knowledge, "data", "text_volume")["bytes_per_token"])
    tokens = megabytes_of(datasets_of(objective, situation), knowledge) * 1e6 / each
    return max(1, round(tokens / max(seq_len, 1)))


def epochs_for(
    objective: Objective, proposal: Proposal, situation: Situation, knowledge: Knowledge
) -> tuple[int, str]:
    """Passes over the data, and why."""
    rules = rule(knowledge, "settings", "epochs")
    if objective in PREFERENCE:
        return int(rules["preference"]), "preferences are learned in one pass; more passes over-optimise"
    if objective in REINFORCEMENT:
        return int(rules["reinforcement"]), "each prompt is tried several times within one pass"
    if objective in ("cpt", "reward"):
        key = "pretraining" if objective == "cpt" else "reward"
        return int(rules[key]), "one pass; a second one mostly memorises"
    rows = counted_rows(objective, situation, knowledge)
    index = next(i for i, least in enumerate(rules["from_rows"]) if rows >= least)
    epochs = int(rules["epochs"][index])
    why = f"{rows:,} rows: {epochs} pass{'es' if epochs > 1 else ''}, the fewer the more rows there are"
    if proposal.facts.group not in ("full", "osf", "lora", "classifier_head"):
        batch = rule(knowledge, "settings", "batch")["small_data"]
        steps = math.ceil(rules["few_parameters_steps"] * batch / max(rows, 1))
        slow = max(epochs, min(int(rules["few_parameters_most"]), steps))
        return (
            slow,
            f"so few trained parameters need many steps (about {rules['few_parameters_steps']:,} in T-Few)",
        )
    if proposal.facts.group == "osf" and situation.earlier:
        steps = int(rules["subspace_steps"])
        slow = math.ceil(steps * rule(knowledge, "settings", "batch")["small_data"] / max(rows, 1))
        slow = min(slow, int(rules["subspace_most"]))
        if slow > epochs:
            return (
                slow,
                f"beside old rows, subspaces learn slowly: on our starter it took about {steps} steps",
            )
    elif situation.wish("must_not_forget") or situation.earlier:
        most = int(rules["must_not_forget_most"])
        if epochs > most:
            return most, f"at most {most} passes, because every pass forgets a little more"
    return epochs, why


def batch_for(
    objective: Objective, proposal: Proposal, stage: StageFit, situation: Situation, knowledge: Knowledge
) -> tuple[int, int, str, str]:
    """(micro-batch, effective batch, why, source)."""
    wanted, why, source = _wanted_batch(objective, proposal, situation, knowledge)
    gpus = stage.settings.gpus
    micro = stage.settings.micro_batch
    if stage.settings.packed:
        each = max(1.0, stage.settings.seq_len / max(stage.lengths.mean, 1.0))
        wanted = max(1, round(wanted / each))
        why += f"; a packed sequence holds about {each:.0f} rows"
    generations = stage.settings.generations if objective in REINFORCEMENT else 1
    unit = micro * gpus
    effective = max(unit, round(wanted / unit) * unit)
    while objective in REINFORCEMENT and generations and effective % generations:
        effective += unit
    return micro, effective, why, source


def _wanted_batch(
    objective: Objective, proposal: Proposal, situation: Situation, knowledge: Knowledge
) -> tuple[int, str, str]:
    rules = rule(knowledge, "settings", "batch")
    rows = counted_rows(objective, situation, knowledge)
    names = {"kto": "kto", "cpt": "pretraining", "reward": "reward"}
    if objective in names or objective in PREFERENCE:
        usual = int(rules[names.get(objective, "preference")])
        least = int(rules["kto_least" if objective == "kto" else "small_data"])
        enough = max(least, 2 ** int(math.log2(max(rows / rules["least_steps"], 1))))
        if objective != "cpt" and rows and enough < usual:
            return enough, f"{rows:,} rows: small batches make enough steps", rules["source"]
        why = "usual for this objective" if objective in names else "pairs are noisy, so more of them a step"
        return usual, why, rules["source"]
    if objective in REINFORCEMENT:
        return int(rules["reinforcement"]), "completions of several prompts a step", rules["source"]
    small = rule(knowledge, "data", "rows")["modest_below"]
    if rows < small:
        return int(rules["small_data"]), f"{rows:,} rows: small batches make enough steps", rules["source"]
    if proposal.tuner == "full":
        if rows >= rules["full_large_from_rows"]:
            return int(rules["full_large"]), "full fine-tuning on much data takes large batches", "tulu3"
        return int(rules["full"]), "full fine-tuning takes larger batches than LoRA", "tulu3"
    return int(rules["adapter"]), "LoRA learns best with batches below 32", rules["source"]


def stage_time(
    stage: StageFit, proposal: Proposal, situation: Situation, knowledge: Knowledge, *,
    epochs: float, effective_batch: int, max_steps: int | None = None,
) -> TimeEstimate:  # fmt: skip
    """Estimate steps and seconds of one stage; online reinforcement counts its generated tokens."""
    rows = stage_rows(stage.objective, situation, knowledge, stage.settings.seq_len)
    mean = stage.lengths.mean
    if stage.objective in REINFORCEMENT:
        rows *= max(stage.settings.generations, 1)
        mean += stage.completion_tokens
    known = [d.lengths for d in datasets_of(stage.objective, situation) if d.lengths]
    kept = heldout_share(stage.objective, situation, knowledge)
    return estimate_time(
        proposal.spec, stage.settings, rows=rows, epochs=epochs, effective_batch=effective_batch,
        max_steps=max_steps, mean_tokens=stage.settings.seq_len if stage.objective == "cpt" else mean,
        lengths=_as_read(stage, known[0], mean) if len(known) == 1 else None,
        accelerator=situation.machine.facts, hardware=situation.scenario.hardware,
        rules=knowledge.rules["time"], heldout_rows=round(kept * rows),
        evaluations=2 + rule(knowledge, "settings", "checkpoints")["saves_per_run"],
    )  # fmt: skip


def _as_read(stage: StageFit, lengths: Histogram, mean: float) -> Histogram | None:
    """Return the distribution of the lengths that a program pads: pairs and answers vary as whole rows do."""
    if stage.objective == "sft":
        return lengths
    if stage.objective in REINFORCEMENT or stage.objective == "cpt":
        return None
    factor = mean / max(mean_length(lengths), 1.0)
    edges = tuple(max(1, round(edge * factor)) for edge in lengths.edges)
    return Histogram(edges=edges, counts=lengths.counts)


def heldout_share(objective: Objective, situation: Situation, knowledge: Knowledge) -> float:
    """Return the share of the rows that is not trained on but measured on."""
    rules, datasets = rule(knowledge, "settings", "heldout"), datasets_of(objective, situation)
    rows = counted_rows(objective, situation, knowledge)
    if any(d.holdout_rows for d in datasets) or objective in REINFORCEMENT or rows < rules["none_below"]:
        return 0.0
    share = rules["fraction_small"] if rows < rules["small_below"] else rules["fraction"]
    return float(min(share, round(rules["most_rows"] / max(rows, 1), 4)))


def hours_of(fit: Fit, proposal: Proposal, situation: Situation, knowledge: Knowledge) -> float:
    """Expected hours of all stages with the settings that the planner would choose."""
    total = 0.0
    for stage in fit.stages:
        epochs, _ = epochs_for(stage.objective, proposal, situation, knowledge)
        _, effective, _, _ = batch_for(stage.objective, proposal, stage, situation, knowledge)
        time = stage_time(stage, proposal, situation, knowledge, epochs=epochs, effective_batch=effective)
        total += time.seconds.expected
    return total / 3600
