"""Judges one aspect each: token ids, template, special tokens, metadata, logits, greedy text, tensors.

Goes in: what the trained model answered, what llama.cpp answered, the bounds. Comes out: `Check`s with the
evidence in words. Never does: load a model; pass what it could not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advisor.errors import InputError
from advisor.export.architecture import ModelPlan
from advisor.export.prefix_file import file_caches
from advisor.export.tokenizer import CONTROL, SPACE, Vocabulary
from advisor.prefix_state import Prefix, read_state
from advisor.types import Check
from advisor.verify.bounds import LogitBounds
from advisor.verify.contents import Contents
from advisor.verify.reference import Questions, Reference, prepare

Logits = Sequence[npt.NDArray[np.float32]]
_USUAL_DEVIATION = 2.0


def _shown(text: object, limit: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def token_ids(questions: Questions, reference: Reference, got: list[list[int]]) -> Check:
    """Compare the token ids of every probe text."""
    pairs = list(zip(questions.texts, reference.token_ids, got, strict=True))
    wrong = [(text, want, have) for text, want, have in pairs if want != have]
    evidence = f"{len(pairs) - len(wrong)} of {len(pairs)} texts give the same token ids"
    normaliser = questions.normaliser
    if normaliser:
        raw = sum(text != prepare(text, normaliser, reference.added) for text in questions.texts)
        what = "a space was put in front" if normaliser == SPACE else "accents were composed (NFC)"
        evidence += f"; {raw} of them only because {what} first, as chat does"
    if wrong:
        text, want, have = wrong[0]
        evidence += f"; first difference {_shown(text)}: trained {_shown(want)}, file {_shown(have)}"
    return Check(
        name="token_ids", passed=not wrong, evidence=evidence,
        measured={"texts": len(pairs), "different": len(wrong)}, bound={"different": 0},
    )  # fmt: skip


def chat_template(
    questions: Questions,
    reference: Reference,
    rendered: list[str | None],
    ids: list[list[int]],
    expected: str | None,
    found: str | None,
) -> Check:
    """Compare the template's text, what it renders, and the token ids of that."""
    wrong = []
    if expected != found:
        wrong.append("the template in the file is not the trained one")
    given = iter(ids)
    for conversation, want, have, want_ids in zip(
        questions.conversations, reference.rendered, rendered, reference.rendered_ids, strict=True
    ):
        have_ids = None if want is None else next(given)
        what = f"{len(conversation.messages)} messages"
        if want != have:
            wrong.append(f"{what}: trained {_shown(want)}, file {_shown(have)}")
        elif want_ids != have_ids:
            wrong.append(f"{what}: rendered alike, but cut into other token ids")
    count = len(questions.conversations)
    evidence = f"{count} conversations rendered and cut alike" if expected is not None else "no chat template"
    return Check(
        name="chat_template", passed=not wrong, evidence="; ".join(wrong[:2]) or evidence,
        measured={"conversations": count, "different": len(wrong)}, bound={"different": 0},
    )  # fmt: skip


def special_tokens(
    vocabulary: Vocabulary, reference: Reference, file: Contents, answer: dict[str, Any], questions: Questions
) -> Check:
    """Check begin, end and padding tokens, their types, and that a prompt begins with one BOS at most."""
    wrong = []
    for name, want in (("eos", vocabulary.eos), ("pad", vocabulary.pad), ("bos", vocabulary.bos)):
        key = {"eos": "eos", "pad": "padding", "bos": "bos"}[name]
        have = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        if want != have:
            wrong.append(f"{name} is token {have} in the file, trained with {want}")
    missing = [vocabulary.tokens[i] for i in vocabulary.end_ids if i not in answer["ends"]]
    if missing:
        wrong.append(f"generation would not stop at {', '.join(missing)}")
    types = file.fields.get("tokenizer.ggml.token_type", [])
    differing = [i for i, kind in enumerate(vocabulary.types) if i >= len(types) or types[i] != kind]
    control = set(answer["control"])
    differing += [i for i, kind in enumerate(vocabulary.types) if kind == CONTROL and i not in control]
    if differing:
        first = differing[0]
        wrong.append(f"{len(set(differing))} tokens have the wrong type, first {vocabulary.tokens[first]!r}")
    doubled = _doubled_bos(vocabulary, reference, answer)
    wrong += [f"a prompt begins with {doubled} BOS tokens"] if doubled > 1 else []
    adds = bool(file.fields.get("tokenizer.ggml.add_bos_token", False))
    if adds != vocabulary.add_bos:
        wrong.append(f"add_bos_token is {adds}, trained prompts need {vocabulary.add_bos}")
    ends = ", ".join(vocabulary.end_texts)
    return Check(
        name="special_tokens", passed=not wrong,
        evidence="; ".join(wrong[:3]) or f"generation ends at {ends}; begin, padding and types as trained",
        measured={**{key: answer[key] for key in ("eos", "pad", "bos")}, "wrong_types": len(set(differing))},
        bound={"eos": vocabulary.eos, "pad": vocabulary.pad, "wrong_types": 0},
    )  # fmt: skip


def _doubled_bos(vocabulary: Vocabulary, reference: Reference, answer: dict[str, Any]) -> int:
    """Return how many BOS tokens a prompt begins with when nothing strips one of two."""
    if vocabulary.bos is None:
        return 0
    most = 0
    for ids, want in zip(answer["with_bos"], reference.rendered_ids, strict=False):
        start = next((n for n, i in enumerate(ids) if i != vocabulary.bos), len(ids))
        trained = (
            0 if want is None else next((n for n, i in enumerate(want) if i != vocabulary.bos), len(want))
        )
        # A runtime strips one of two when the template brings its own.
        most = max(most, start - 1 if trained and start > 1 else start)
    return most


def expected_model(plan: ModelPlan) -> dict[str, Any]:
    """Return what the file must say of the model."""
    return {"general.architecture": plan.architecture.gguf, **plan.metadata}


def metadata(want: dict[str, Any], vocabulary: Vocabulary, file: Contents) -> Check:
    """Compare architecture, sizes and vocabulary with config.json and the tokenizer.

    Args:
        want: What the file must say of the model; nothing where the architecture is not known here.
        vocabulary: What it must say of the tokenizer.
        file: What it says.
    """
    wrong = []
    for key, value in want.items():
        have = file.fields.get(key)
        same = have is not None and (
            np.float32(have) == np.float32(value) if isinstance(value, float) else have == value
        )
        if not same:
            wrong.append(f"{key} is {have!r}, trained {value!r}")
    lists: dict[str, Any] = {
        "model": vocabulary.model, "tokens": list(vocabulary.tokens), "pre": vocabulary.pre,
    }  # fmt: skip
    if vocabulary.scores:
        lists |= {"scores": list(vocabulary.scores), "add_space_prefix": vocabulary.add_space_prefix}
    else:
        lists["merges"] = list(vocabulary.merges)
    for name, value in lists.items():
        have = file.fields.get(f"tokenizer.ggml.{name}")
        if have != value:
            what = "not the trained list" if isinstance(value, list) else f"{have!r} instead of {value!r}"
            wrong.append(f"tokenizer.ggml.{name} is {what}")
    return Check(
        name="metadata", passed=not wrong,
        evidence="; ".join(wrong[:3]) or f"{len(want) + len(lists)} entries as trained; {file.quant}",
        measured={"quant": file.quant, "different": len(wrong)}, bound={"different": 0},
    )  # fmt: skip


def prefix(trained: Prefix | None, state: Path | None, plan: ModelPlan) -> Check:
    """Compare the sequence state with what peft puts into the cache: the same numbers, bit for bit.

    Args:
        trained: As peft hands it over; None where no prefix was trained.
        state: The file; None where there is none.
        plan: Of the base.
    """
    if trained is None or state is None:
        missing = (
            "no prefix was trained" if trained is None else "the trained prefix is missing: give --prefix"
        )
        return Check(name="prefix", passed=False, measured={}, bound={}, evidence=missing)
    try:
        have = read_state(state)
    except InputError as problem:
        return Check(name="prefix", passed=False, measured={}, bound={}, evidence=problem.message)
    want = file_caches(trained, plan)
    layers, tokens, _ = trained.keys.shape
    same = len(want) == len(have) and all(
        np.array_equal(ours.keys, theirs.keys) and np.array_equal(ours.values, theirs.values)
        for ours, theirs in zip(want, have, strict=True)
    )
    told = f"keys and values of {tokens} tokens in {layers} layers"
    return Check(
        name="prefix", passed=same, measured={"layers": layers, "tokens": tokens}, bound={},
        evidence=f"{told} {'as trained' if same else 'are not those that were trained'}",
    )  # fmt: skip


def logits(reference: Logits, got: Logits, sequences: Sequence[list[int]], bounds: LogitBounds) -> Check:
    """Compare next-token distributions at every position, and how well both expect the text itself.

    Args:
        reference: Of the trained model, (positions, vocabulary) for each sequence.
        got: Of the file.
        sequences: Token ids of the same.
        bounds: Of the quantisation.
    """
    kls, deltas, same, deviations = [], [], [], []
    surprise = np.zeros(2)
    for want, have, ids in zip(reference, got, sequences, strict=True):
        log_want, log_have = _log_softmax(want), _log_softmax(have)
        following = (np.arange(len(ids) - 1), np.array(ids[1:], dtype=np.intp))
        surprise -= (log_want[:-1][following].sum(), log_have[:-1][following].sum())
        kls.append((np.exp(log_want) * (log_want - log_have)).sum(-1))
        deltas.append(np.abs(want - have).max(-1))
        same.append(want.argmax(-1) == have.argmax(-1))
        deviations.append(float(want.std()))
    kl, delta, top1 = np.concatenate(kls), np.concatenate(deltas), np.concatenate(same)
    most_delta = bounds.max_delta * max(1.0, max(deviations) / _USUAL_DEVIATION)
    measured = {
        "kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "max_delta": float(delta.max()),
        "top1": float(top1.mean()), "positions": len(kl),
        "perplexity_change": float(np.expm1((surprise[1] - surprise[0]) / max(1, len(kl) - len(sequences)))),
    }  # fmt: skip
    bound = {"kl_mean": bounds.kl_mean, "kl_max": bounds.kl_max, "max_delta": most_delta, "top1": bounds.top1}
    wrong = [f"{key} {measured[key]:.3g} > {bound[key]:.3g}" for key in ("kl_mean", "kl_max", "max_delta")
             if not measured[key] <= bound[key]]  # fmt: skip
    wrong += (
        [f"top1 {measured['top1']:.3g} < {bounds.top1:.3g}"] if not measured["top1"] >= bounds.top1 else []
    )
    told = (
        f"{len(kl)} positions: KL {measured['kl_mean']:.2g} on average, {measured['kl_max']:.2g} at most; "
        f"same likeliest token at {100 * measured['top1']:.1f} %"
    )
    return Check(
        name="logits", passed=not wrong, evidence="; ".join([*wrong, told]),
        measured={**measured}, bound={**bound},
    )  # fmt: skip


def arithmetic(own: Logits, got: Logits, bound: float) -> Check:
    """Compare with what the trained model's program makes of the same weights, whatever they are worth.

    Args:
        own: Of that program with the file's weights, (positions, vocabulary) for each sequence.
        got: Of the file.
        bound: Error of the logits over their standard deviation, the mean of each position left out.
    """
    want, have = (np.concatenate(list(side)).astype(np.float64) for side in (own, got))
    want -= want.mean(-1, keepdims=True)
    have -= have.mean(-1, keepdims=True)
    error = float(np.sqrt(((have - want) ** 2).mean() / (want**2).mean()))
    told = f"{len(want)} positions: logits off by {100 * error:.2g} % of their deviation"
    return Check(
        name="arithmetic", passed=error <= bound,
        evidence=f"{told}, computed from the weights in the file",
        measured={"error": error, "positions": len(want)}, bound={"error": bound},
    )  # fmt: skip


def _log_softmax(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def greedy_text(
    reference: Reference,
    got: list[list[int]],
    bounds: LogitBounds,
    tolerance: float,
    tokens_per_second: float,
) -> Check:
    """Compare greedy continuations; a difference where the trained model itself hardly prefers is a tie."""
    wrong, ties, agreed, total = [], 0, 0, 0
    for want, gaps, have in zip(reference.greedy, reference.gaps, got, strict=True):
        split = next((n for n, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), None)
        if split is None and len(want) != len(have):
            split = min(len(want), len(have))
        agreed += len(want) if split is None else split
        total += len(want)
        if split is not None and (split >= len(gaps) or gaps[split] > tolerance):
            lead = gaps[min(split, len(gaps) - 1)]
            wrong.append(f"token {split + 1} differs where the trained model leads by {lead:.3g}")
        elif split is not None:
            ties += 1
    passed = not wrong or not bounds.exact_text
    told = f"{agreed} of {total} greedy tokens alike before the first difference"
    told += f"; {ties} differ at a tie" if ties else ""
    told += "" if bounds.exact_text else " (advisory for this quantisation)"
    return Check(
        name="greedy_text", passed=passed, evidence="; ".join([*wrong[:1], told]),
        measured={
            "tokens": total, "alike": agreed, "ties": ties, "different": len(wrong),
            "tokens_per_second": round(tokens_per_second, 2),
        },
        bound={"different": 0 if bounds.exact_text else None},
    )  # fmt: skip
