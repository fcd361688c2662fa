"""The plan in plain words: one paragraph, what else is worth doing, what was assumed.

Goes in: a Case and the verdict. Comes out: text. Never does: decide.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.plan.case import Case, allowed_hours, takes_too_long
from advisor.recommend import Option
from advisor.recommend.chains import never_succeeds
from advisor.recommend.fit import least_bytes
from advisor.recommend.reasons import because
from advisor.recommend.situation import rows_of
from advisor.types import Alternative, ExportPlan, Verdict
from advisor.units import format_bytes, format_count, format_seconds

METHODS = {
    "none_rag": "retrieval (RAG) instead of training",
    "none_prompting": "prompting instead of training",
    "none": "no training",
}


LEADS: dict[Verdict, str] = {
    "fix_data_first": "Mend the data first, then: ",
    "change_plan": "Another way than asked: ",
    "change_model": "Another model than asked: ",
}
TOO_LONG = "This takes too long as it stands: "
TOO_MUCH = "Your settings do not fit: "


def summary(case: Case, verdict: Verdict, knowledge: Knowledge) -> str:
    """One paragraph: what, why, cost, risk."""
    parts = [_what(case, verdict, knowledge), _why(case)]
    if case.stages and case.option and case.option.fit:
        high = max(stage.estimate.peak_bytes.high for stage in case.stages)
        free = case.situation.machine.free_bytes
        time = format_seconds(case.seconds())
        parts.append(f"It needs at most {format_bytes(high)} of {format_bytes(free)} and about {time}.")
    if case.export is not None and case.export.feasible and case.spec is not None:
        parts.append(f"The result becomes {_file(case.export)}.")
    return " ".join(part for part in parts if part)


def _what(case: Case, verdict: Verdict, knowledge: Knowledge) -> str:
    decision = case.advice.decision
    if decision.instead and not case.stages:
        return f"Advice: {METHODS[decision.instead]}."
    if case.option is None or case.spec is None:
        return "Nothing that was considered fits this machine."
    title = knowledge.tuners[case.tuner].title
    chain = ", then ".join(short_name(o, knowledge) for o in case.objectives)
    size = format_count(case.spec.parameters)
    many = len(case.stages) if len(case.stages) > len(case.objectives) else 0
    each = f", one result for each of {many} datasets" if many else ""
    return (
        f"{_lead(case, verdict, knowledge)}{title} with {chain} on {case.spec.id} ({size} parameters){each}."
    )


def _file(target: ExportPlan) -> str:
    if target.format == "gguf":
        beside = ", with the trained prefix in a file beside it" if target.route == "prefix_state" else ""
        return f"a {target.quant} GGUF of {format_bytes(target.file_bytes)}{beside}"
    if target.route == "adapter":
        return "an adapter that a server loads beside its base"
    return f"merged 16-bit weights of {format_bytes(target.file_bytes)} for a server"


def _lead(case: Case, verdict: Verdict, knowledge: Knowledge) -> str:
    if verdict == "change_plan" and case.over_memory:
        return TOO_MUCH
    asked = case.advice.method_refused is not None or case.advice.decision.verdict == "change_plan"
    if verdict == "change_plan" and not asked and takes_too_long(case, knowledge):
        return TOO_LONG
    return LEADS.get(verdict, "")


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

    def suggest(code: str, key: str = "", /, **figures: object) -> None:
        text = because(knowledge, "alternative", key or code, **figures).reason
        found.append(Alternative(code=code, message=text))

    decision, situation, objectives = case.advice.decision, case.situation, set(case.objectives)
    if takes_too_long(case, knowledge):
        hours = allowed_hours(case, knowledge)
        suggest("less_data", hours=f"{hours:g}", share=f"{hours * 3600 / case.seconds():.0%}")
    if decision.instead == "none_rag":
        suggest("rag")
        suggest("rag_then_sft_for_style")
    elif decision.instead == "none_prompting":
        suggest("few_shot")
        suggest("collect_data")
    elif situation.goal.task == "facts":
        suggest("rag", "facts")
    if "dpo" in objectives:
        suggest("kto")
    if "grpo" in objectives:
        hopeless = never_succeeds(situation, knowledge) and not situation.demos
        suggest("worked_solutions" if hopeless else "rejection_sampling")
    if "cpt" in objectives and "sft" not in objectives:
        suggest("sft_after_cpt")
    if situation.wish("must_not_forget") and not situation.earlier and case.stages:
        suggest("self_generated")
    if situation.machine.vendor == "apple":
        suggest("mlx_qlora")
    if decision.instead is None and (slow := _better_but_slow(case)):
        share = case.option.hours / slow.hours if case.option else 0.0
        suggest("fewer_rows", model=slow.proposal.spec.id, method=slow.proposal.tuner, share=f"{share:.0%}")
    if decision.instead is None and (better := _next_better(case)):
        option, needed = better
        if option.no_fit and option.no_fit.rough:
            needed = least_bytes(option.proposal, situation, knowledge)
        names = {"method": option.proposal.tuner, "model": option.proposal.spec.id}
        suggest("more_memory", memory=format_bytes(needed), **names)
    return tuple(found)


def _better_but_slow(case: Case) -> Option | None:
    """What would be better but for its time, where the model was free and the rows are many."""
    chosen = case.option
    if chosen is None or not chosen.in_time or case.situation.spec is not None:
        return None
    slow = [o for o in case.advice.options if o.fit and not o.in_time and o.score > chosen.score]
    return max(slow, key=lambda o: o.score, default=None)


def _next_better(case: Case) -> tuple[Option, float] | None:
    """What lacks the least memory: of what was asked for and refused, else of what would be better."""
    advice, goal = case.advice, case.situation.goal
    lacking = [(o, o.no_fit.needed_bytes) for o in advice.options if o.no_fit and o.no_fit.needed_bytes]
    wished: list[tuple[Option, float]] = []
    if advice.model_refused is not None and case.situation.spec is not None:
        wished = [pair for pair in lacking if pair[0].proposal.spec.id == case.situation.spec.id]
    if advice.method_refused is not None:
        wished = [pair for pair in wished or lacking if pair[0].proposal.tuner == goal.requested_method]
    score = case.option.score if case.option else float("-inf")
    better = [pair for pair in lacking if pair[0].score > score]
    return min(wished or better, key=lambda pair: pair[1], default=None)


def assumptions(case: Case, knowledge: Knowledge) -> tuple[str, ...]:
    """How the wish was understood, and what was not told."""
    goal = case.situation.goal
    heard = [
        f"{meaning} (from {phrase!r})" for meaning, phrase in goal.phrases.items() if phrase != "declared"
    ]
    said = [
        f"Understood: {', '.join(heard)}." if heard else "",
        *(f"{text[:1].upper()}{text[1:]}." for text in goal.unclear),
    ]
    if case.situation.named.how == "guessed":
        said.append(
            f"{case.situation.named.asked} is not in kb/: its shape was guessed from the size in its name."
        )
    if case.situation.named.how == "words":
        said.append(f"No model is called {case.situation.named.asked!r}; one was chosen.")
    spec, turns = case.situation.spec, set(case.objectives) - {"cpt"}
    if spec and turns and any(finding.code == "no_chat_template" for finding in spec.findings):
        said.append(
            f"{spec.id} has no chat template: it is given a plain one (### User: and ### Assistant:), and "
            "each answer ends with its own end token."
        )
    hardware = case.situation.scenario.hardware
    if hardware.origin == "declared":
        ram = format_bytes(hardware.ram_bytes)
        said.append(
            f"The machine was declared, not probed: {case.situation.machine.name}, {ram} of host memory."
        )
    machine = case.situation.machine
    if machine.device == "cuda" and machine.facts is None:
        formats = "bf16" if machine.bf16 else "fp16, no bf16"
        said.append(
            f"{machine.name} is not in kb/hardware: {formats} was assumed (a hardware file can say more). "
            "Its speed is not known: the times are a wide guess and chose nothing."
        )
    guessed = [
        d.name
        for d in case.situation.train
        if not (d.mean_tokens or d.p95_tokens or d.max_tokens) and rows_of((d,))
    ]
    if guessed:
        said.append(f"Row lengths are not known for {', '.join(guessed)}; an ordinary length was taken.")
    return tuple(text for text in said if text)
