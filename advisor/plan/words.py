"""The plan in plain words: one paragraph, what else is worth doing, what was assumed.

Goes in: a Case and the verdict. Comes out: text. Never does: decide.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.plan.case import Case
from advisor.recommend.situation import rows_of
from advisor.types import Alternative, Verdict
from advisor.units import format_bytes, format_count, format_seconds

METHODS = {
    "none_rag": "retrieval (RAG) instead of training",
    "none_prompting": "prompting instead of training",
    "none": "no training",
}


def summary(case: Case, verdict: Verdict, knowledge: Knowledge) -> str:
    """One paragraph: what, why, cost, risk."""
    parts = [_what(case, verdict, knowledge), _why(case)]
    if case.stages and case.option and case.option.fit:
        high, free = case.option.fit.peak_high, case.situation.machine.free_bytes
        parts.append(
            f"It needs at most {format_bytes(high)} of {format_bytes(free)} and about {format_seconds(case.seconds())}."
        )
    if case.export is not None and case.export.feasible and case.spec is not None:
        parts.append(
            f"The result becomes a {case.export.quant} GGUF of {format_bytes(case.export.file_bytes)}."
        )
    return " ".join(part for part in parts if part)


def _what(case: Case, verdict: Verdict, knowledge: Knowledge) -> str:
    decision = case.advice.decision
    if decision.instead and not case.stages:
        return f"Advice: {METHODS[decision.instead]}."
    if case.option is None or case.spec is None:
        return "Nothing that was considered fits this machine."
    title = knowledge.tuners[case.tuner].title
    chain = ", then ".join(short_name(o, knowledge) for o in case.objectives)
    lead = {"fix_data_first": "Mend the data first, then: ", "change_plan": "Another way than asked: ",
            "change_model": "Another model than asked: ", "dont_train_yet": "Not yet; if you insist: "}  # fmt: skip
    return f"{lead.get(verdict, '')}{title} with {chain} on {case.spec.id} ({format_count(case.spec.parameters)} parameters)."


def short_name(objective: str, knowledge: Knowledge) -> str:
    """The abbreviation in an objective's title, else the title."""
    title = knowledge.objectives[objective].title
    return title.rpartition("(")[2].rstrip(")") if title.endswith(")") else title.lower()


def _why(case: Case) -> str:
    decision, advice = case.advice.decision, case.advice
    reasons = [decision.why]
    asked = case.situation.goal.requested_objective
    if advice.model_refused is not None:
        reasons.append(f"{case.situation.named.asked} was not taken: {advice.model_refused.reason}")
    if case.situation.named.how == "closed":
        reasons.append(
            f"the weights of {case.situation.named.asked} are not available, so an open model stands in"
        )
    if advice.method_refused is not None:
        reasons.append(
            f"{case.situation.goal.requested_method} was not taken: {advice.method_refused.reason}"
        )
    if decision.refused_request and asked:
        alone = " alone" if asked in case.objectives else ""
        reasons.append(f"{asked}{alone} was not taken: {decision.refused_request}")
    elif decision.refused_request:
        reasons.append(decision.refused_request)
    text = "; ".join(reason for reason in reasons if reason)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def alternatives(case: Case, knowledge: Knowledge) -> tuple[Alternative, ...]:
    """What else is worth doing, and the cheapest change that would make more possible."""
    found: list[Alternative] = []
    decision, situation = case.advice.decision, case.situation
    if decision.instead == "none_rag":
        found.append(
            _alternative(
                "rag", "Put the documents into a retrieval index and let the model answer from what it finds."
            )
        )
        found.append(
            _alternative(
                "rag_then_sft_for_style",
                "Once retrieval works, a few hundred demonstrations of the wanted answers (with the found passages in the prompt) can be trained with LoRA for tone and format.",
            )
        )
    elif decision.instead == "none_prompting":
        found.append(
            _alternative("few_shot", "Put five to ten of the best examples into the prompt and measure.")
        )
        found.append(
            _alternative("collect_data", "Collect at least 50 good examples, better 1,000, and plan again.")
        )
    if situation.goal.task == "facts" and decision.instead is None:
        found.append(_alternative("rag", "For facts that change or must be cited, add retrieval."))
    if "dpo" in case.objectives:
        found.append(
            _alternative("kto", "KTO takes the same data as single labels, if pairs are hard to come by.")
        )
    if set(case.objectives) & {"grpo"} or "dpo" in decision.rejected and situation.answered:
        found.append(
            _alternative(
                "rejection_sampling",
                "Sample several answers, keep the right ones and train on them with SFT: simpler than reinforcement and often close.",
            )
        )
    if "cpt" in case.objectives and "sft" not in case.objectives:
        found.append(
            _alternative(
                "sft_after_cpt",
                "After reading on, a model answers worse: add demonstrations for an SFT stage.",
            )
        )
    if situation.machine.vendor == "apple":
        found.append(
            _alternative("mlx_qlora", "mlx-lm trains 4-bit LoRA on Apple silicon, where larger models fit.")
        )
    found += _in_time(case)
    found += _what_if(case)
    return tuple(found)


def _alternative(code: str, message: str) -> Alternative:
    return Alternative(code=code, message=message)


def _in_time(case: Case) -> list[Alternative]:
    """How many steps the allowed time holds, where the whole plan takes longer."""
    allowed, seconds = case.situation.scenario.goal.max_hours, case.seconds()
    if allowed is None or seconds <= allowed * 3600 or not case.stages:
        return []
    share = allowed * 3600 / seconds
    message = (
        f"In {allowed:g} hours about {share:.0%} of the planned steps can be done: train on the best {share:.0%} of the "
        "rows for one pass, take a smaller model, or a faster device."
    )
    return [_alternative("less_data", message)]


def _what_if(case: Case) -> list[Alternative]:
    """The smallest memory that would open the next better way."""
    if case.option is None:
        better = [o for o in case.advice.options if o.no_fit]
    else:
        better = [o for o in case.advice.options if o.no_fit and o.score > case.option.score]
        asked = case.situation.goal.requested_method
        better = [o for o in better if o.proposal.tuner == asked] or better
    if not better:
        return []
    nearest = min(better, key=lambda o: o.no_fit.needed_bytes if o.no_fit else 0.0)
    if nearest.no_fit is None:
        return []
    message = (
        f"With {format_bytes(nearest.no_fit.needed_bytes)} of free memory on the device, {nearest.proposal.tuner} of "
        f"{nearest.proposal.spec.id} would be possible."
    )
    return [_alternative("more_memory", message)]


def assumptions(case: Case, knowledge: Knowledge) -> tuple[str, ...]:
    """How the wish was understood, and what was not told."""
    goal = case.situation.goal
    heard = [
        f"{meaning} (from {phrase!r})" for meaning, phrase in goal.phrases.items() if phrase != "declared"
    ]
    said = [
        f"Understood: {', '.join(heard)}." if heard else "",
        *(f"Not said: {text}." for text in goal.unclear),
    ]
    if case.situation.named.how == "guessed":
        said.append(
            f"{case.situation.named.asked} is not in kb/: its shape was guessed from the size in its name."
        )
    if case.situation.named.how == "words":
        said.append(f"No model is called {case.situation.named.asked!r}; one was chosen.")
    hardware = case.situation.scenario.hardware
    if hardware.origin == "declared":
        said.append(
            f"The machine was declared, not probed: {case.situation.machine.name}, {format_bytes(hardware.ram_bytes)} of host memory."
        )
    guessed = [
        d.name
        for d in case.situation.train
        if not (d.mean_tokens or d.p95_tokens or d.max_tokens) and rows_of((d,))
    ]
    if guessed:
        said.append(f"Row lengths are not known for {', '.join(guessed)}; an ordinary length was taken.")
    return tuple(text for text in said if text)
