"""Proves that a GGUF file answers as the trained model does.

Goes in: the file, the run or model folder it was made from, held-out rows. Comes out: `Verification`, also
written beside the file. Never does: compare with our own merge: the reference is transformers and peft.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from advisor.errors import ExportError, MissingPackageError
from advisor.export.adapter import grown_config, virtual_tokens
from advisor.export.architecture import plan_model
from advisor.export.chat_template import Conversation
from advisor.export.config_fields import is_tied, vocabulary_rows
from advisor.export.files import proof_file
from advisor.export.merged import Layout
from advisor.export.native import Arrays, run_llama
from advisor.export.official import needs_converter
from advisor.export.source import Trained, find_trained
from advisor.export.tokenizer import Vocabulary, read_vocabulary, with_virtual_tokens
from advisor.probe.gguf_file import check_gguf
from advisor.running import named_prefix, read_facts
from advisor.storage import write_json
from advisor.types import Check, Verification
from advisor.verify.bounds import LogitBounds, VerifyRules, logit_bounds, told_only, verify_rules
from advisor.verify.contents import Contents, DamagedError, read_contents
from advisor.verify.samples import heldout_rows, probe_texts, read_conversations

if TYPE_CHECKING:
    from advisor.verify.reference import Questions, Reference

__all__ = ["heldout_rows", "keep_proof", "verify_gguf"]


def _silent(_: str) -> None:
    """Say nothing."""


def verify_gguf(
    gguf: Path,
    *,
    against: Path,
    rows: Sequence[Path] = (),
    prefix: Path | None = None,
    offline: bool = False,
    on_progress: Callable[[str], None] = _silent,
) -> Verification:
    """Compare a GGUF file with the model that it was made from.

    Args:
        gguf: The file.
        against: Run folder, adapter folder or Hugging Face folder.
        rows: Files of held-out rows whose logits are compared; without any, built-in texts are.
        prefix: Sequence state to begin with; None takes the one that the file names.
        offline: Never ask the hub for the base model.
        on_progress: Told in a few words what is being done.

    Returns:
        One check for each aspect.

    Raises:
        InputError: the file is missing or no GGUF, or the folder is not usable.
        ModelError: the trained model cannot be loaded.
    """
    check_gguf(gguf)
    _need_packages()
    trained = find_trained(against, offline=offline, on_progress=on_progress)
    try:
        file = read_contents(gguf)
        state = prefix or named_prefix(gguf, read_facts(gguf))
        checks = _checks(gguf, file, trained, tuple(rows), state, on_progress)
        quant = file.quant
    except DamagedError as problem:
        quant = "unknown"
        damaged = Check(name="metadata", passed=False, measured={}, bound={}, evidence=str(problem))
        checks = (damaged,)
    return Verification(
        passed=all(check.passed for check in checks),
        gguf=str(gguf),
        against=str(against),
        quant=quant,
        checks=checks,
    )


def keep_proof(proof: Verification) -> None:
    """Write a proof as `<file>.verification.json` beside the file that it is about."""
    write_json(proof_file(Path(proof.gguf)), proof)


def _need_packages() -> None:
    wanted = {"torch": "train", "transformers": "train", "peft": "train", "gguf": "gguf", "llama_cpp": "gguf"}
    for module, extra in wanted.items():
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(module, extra)


def _checks(
    gguf: Path,
    file: Contents,
    trained: Trained,
    rows: tuple[Path, ...],
    state: Path | None,
    on_progress: Callable[[str], None],
) -> tuple[Check, ...]:
    # torch takes seconds to import, and `verify --help` must not wait for it.
    from advisor.verify import checks, own_weights, tensors

    rules = verify_rules()
    config = trained.config
    count = virtual_tokens(None if trained.adapter is None else Path(trained.adapter))
    vocabulary = with_virtual_tokens(
        read_vocabulary(Path(trained.tokenizer), Path(trained.base), rows=vocabulary_rows(config)), count
    )
    config = grown_config(config, count)
    on_progress("asking the trained model")
    tied, known = is_tied(config), not needs_converter(config)
    context = plan_model(config, own_head=not tied).context if known else _plain_context(config)
    questions, reference = _reference(
        trained, rows, probe_texts(rules, vocabulary), vocabulary.normaliser, context
    )
    if known:
        plan = plan_model(config, own_head=not tied or _is_untied(reference, Layout.of(config)))
        model, activation = checks.expected_model(plan), plan.architecture.activation[0]
        compared = tensors.check_tensors(plan, file, reference, rules.tensors)
    else:
        model, activation = {}, str(config.get("hidden_act") or config.get("hidden_activation"))
        compared = tensors.check_sizes(file, reference, rules.tensors)
    early = [checks.metadata(model, vocabulary, file), compared]
    if known and (state is not None or reference.cached is not None):
        early.append(checks.prefix(reference.cached, state, plan))
    if reference.four_bits is not None:
        early.append(reference.four_bits)
    bounds = logit_bounds(rules, file.quant, activation, routed=_is_routed(config))
    own: list[npt.NDArray[np.float32]] | None = None
    if known and compared.passed and file.quant in rules.arithmetic.errors:
        on_progress("computing with the weights in the file")
        own = own_weights.own_logits(plan, file, reference, Layout.of(config))
        bounds = told_only(bounds)
    on_progress(f"asking {gguf.name}")
    try:
        answer, arrays = _ask(gguf, questions, reference, vocabulary, rules, state)
    except ExportError as problem:
        return (*early, Check(name="logits", passed=False, measured={}, bound={}, evidence=problem.message))
    got = _logits(reference, config["vocab_size"], arrays)
    if own is not None:
        early.append(checks.arithmetic(own, got, rules.arithmetic.errors[file.quant]))
    return (*_late(file, vocabulary, questions, reference, answer, got, bounds), *early)


def _logits(reference: Reference, rows: int, arrays: Arrays) -> list[npt.NDArray[np.float32]]:
    """Return the file's logits of each sequence, (positions, vocabulary), without those of virtual tokens."""
    first, size = len(reference.prefix), rows - len(reference.prefix)
    return [arrays[str(number)][first:, :size] for number in range(len(reference.sequences))]


def _plain_context(config: dict[str, Any]) -> int:
    """Return the tokens for which an architecture that is not known here is surely computed alike."""
    limits = (config.get("max_position_embeddings"), config.get("sliding_window"))
    return min((int(limit) for limit in limits if limit), default=verify_rules().samples.row_tokens)


def _is_routed(config: dict[str, Any]) -> bool:
    """Whether experts are chosen for each token, which a small difference may tip."""
    return any(
        int(config.get(key) or 0) > 1 for key in ("num_local_experts", "num_experts", "n_routed_experts")
    )


def _late(
    file: Contents,
    vocabulary: Vocabulary,
    questions: Questions,
    reference: Reference,
    answer: dict[str, Any],
    got: list[npt.NDArray[np.float32]],
    bounds: LogitBounds,
) -> tuple[Check, ...]:
    """Judge what llama.cpp answered."""
    from advisor.verify import checks

    count = len(questions.texts)
    logits = checks.logits(reference.logits, got, reference.sequences, bounds)
    tie = 2 * min(float(values["max_delta"] or 0.0) for values in (logits.measured, logits.bound))
    template = file.fields.get("tokenizer.chat_template")
    return (
        checks.token_ids(questions, reference, answer["token_ids"][:count]),
        logits,
        checks.greedy_text(reference, answer["greedy"], bounds, tie, answer["tokens_per_second"]),
        checks.chat_template(
            questions,
            reference,
            answer["rendered"],
            answer["token_ids"][count:],
            vocabulary.chat_template,
            template,
        ),
        checks.special_tokens(vocabulary, reference, file, answer, questions),
    )


def _ask(
    gguf: Path,
    questions: Questions,
    reference: Reference,
    vocabulary: Vocabulary,
    rules: VerifyRules,
    state: Path | None,
) -> tuple[dict[str, Any], Arrays]:
    from advisor.verify.reference import prepare

    rendered = [text for text in reference.rendered if text is not None]
    texts = [prepare(text, vocabulary.normaliser, reference.added) for text in (*questions.texts, *rendered)]
    longest = max(len(ids) for ids in (*reference.sequences, *reference.prompts))
    before = len(reference.prefix) + (0 if reference.cached is None else reference.cached.keys.shape[1])
    return run_llama(
        {
            "do": "inspect",
            "gguf": str(gguf),
            "prefix": None if state is None else str(state),
            "context": longest + before + rules.samples.greedy_tokens + 8,
            "texts": texts,
            "with_bos": rendered,
            "conversations": [
                {"messages": list(c.messages), "generation_prompt": c.generation_prompt}
                for c in questions.conversations
            ],
            "sequences": [reference.prefix + ids for ids in reference.sequences],
            "prompts": [reference.prefix + ids for ids in reference.prompts],
            "greedy_tokens": max(len(tokens) for tokens in reference.greedy),
            "ends": reference.ends,
        }
    )


def _is_untied(reference: Reference, layout: Layout) -> bool:
    """Whether training parted the output layer from the embedding."""
    embedding, head = reference.weights[layout.embedding], reference.weights.get(layout.head)
    return head is not None and head.data_ptr() != embedding.data_ptr() and not bool(head.equal(embedding))


def _reference(
    trained: Trained,
    rows: tuple[Path, ...],
    texts: tuple[str, ...],
    normaliser: str | None,
    context: int,
) -> tuple[Questions, Reference]:
    """Ask the trained model; the files of one export share its answers."""
    places = (trained.base, trained.adapter, trained.tokenizer, *map(str, rows))
    stamps = tuple(_stamp(Path(place)) for place in places if place is not None)
    return _asked(trained, rows, texts, normaliser, context, stamps)


def _stamp(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


@functools.lru_cache(maxsize=1)
def _asked(
    trained: Trained,
    rows: tuple[Path, ...],
    texts: tuple[str, ...],
    normaliser: str | None,
    context: int,
    stamps: tuple[float, ...],
) -> tuple[Questions, Reference]:
    from advisor.verify.reference import Questions, load_reference

    rules = verify_rules()
    questions = Questions(
        texts=texts,
        conversations=Conversation.samples(),
        rows=tuple(read_conversations(rows)),
        prompts=rules.probe.prompts,
        normaliser=normaliser,
    )
    samples = msgspec.structs.replace(
        rules.samples,
        row_tokens=min(rules.samples.row_tokens, context),
        greedy_tokens=min(rules.samples.greedy_tokens, context // 2),
    )
    return questions, load_reference(trained, questions, samples)
