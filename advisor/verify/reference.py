"""What the trained model itself says: token ids, rendered prompts, logits, greedy text, weights.

Goes in: base, adapter and tokenizer folders. Comes out: `Reference`, computed by transformers and peft in
float32, with the adapter live. Never does: use our own merge or our own tokenizer reading.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from advisor.errors import ModelError, RefusedError
from advisor.export.chat_template import Conversation
from advisor.export.checkpoint import open_checkpoint
from advisor.export.merged import Layout
from advisor.export.source import Trained
from advisor.export.tokenizer import SPACE, needs_space
from advisor.prefix_state import Prefix
from advisor.probe.host import memory
from advisor.probe.load import free_cores
from advisor.types import Check
from advisor.units import format_bytes
from advisor.verify import four_bits
from advisor.verify.bounds import Samples

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """What both sides are asked."""

    texts: tuple[str, ...]
    conversations: tuple[Conversation, ...]
    rows: tuple[Conversation | str, ...]
    """Held-out rows to score."""
    prompts: tuple[str, ...]
    """Questions to continue greedily."""
    normaliser: str | None = None
    """What the file expects to have been done to a text before."""


@dataclasses.dataclass(kw_only=True)
class Reference:
    """The trained model's answers, and the model with its adapter merged by peft."""

    model: Any
    """Merged; of prefix tuning with the prefix live, of other virtual tokens the base alone."""
    token_ids: list[list[int]]
    rendered: list[str | None]
    rendered_ids: list[list[int] | None]
    sequences: list[list[int]]
    logits: list[Floats]
    prompts: list[list[int]]
    greedy: list[list[int]]
    ends: list[int]
    """Tokens that end a greedy continuation."""
    gaps: list[list[float]]
    """For each greedy token, by how much its logit leads the second."""
    special: dict[str, int | None]
    prefix: list[int]
    """Virtual tokens, by the ids that they have in the file."""
    cached: Prefix | None
    """Virtual tokens that are keys and values in every layer, as peft hands them to the model."""
    four_bits: Check | None
    """What it changes that training saw the base in four bits."""
    added: tuple[str, ...]
    """Texts that the tokenizer cuts out before anything else."""
    weights: dict[str, torch.Tensor]
    deltas: dict[str, Callable[[], torch.Tensor]]
    """Parameter -> what a low-rank adapter adds to it."""

    def weight(self, name: str) -> Floats:
        """Return a trained parameter."""
        found: Floats = self.weights[name].numpy()
        return found


def load_reference(trained: Trained, questions: Questions, samples: Samples) -> Reference:
    """Load the trained model in float32 and ask it everything.

    Raises:
        ModelError: transformers or peft cannot load it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, free_cores()))
    try:
        tokenizer, model = load_trained(trained)
        ends = _end_ids(model, tokenizer)
        sequences = list(_sequences(tokenizer, questions, samples))
        prompts = [_prompt_ids(tokenizer, text) for text in questions.prompts[: samples.greedy_prompts]]
        with torch.inference_mode():
            logits = [_logits(model, ids) for ids in sequences]
            continued = [_greedy(model, ids, samples.greedy_tokens, ends) for ids in prompts]
        rendered = [render(tokenizer, conversation) for conversation in questions.conversations]
        cached = _cached(model)
        weights, deltas, virtual = _weights(model)
        words, prefix = _virtual_tokens(model, virtual)
        added = tuple(tokenizer.get_added_vocab())
        return Reference(
            model=model if cached is not None else base_of(model),
            token_ids=[token_ids(tokenizer, text) for text in questions.texts],
            rendered=[
                None if text is None else words + _led(text, questions.normaliser, added) for text in rendered
            ],
            rendered_ids=[None if text is None else prefix + token_ids(tokenizer, text) for text in rendered],
            sequences=sequences,
            logits=logits,
            prompts=prompts,
            greedy=[tokens for tokens, _ in continued],
            ends=sorted(ends),
            gaps=[gaps for _, gaps in continued],
            special={name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            prefix=prefix,
            cached=cached,
            four_bits=_four_bits(trained, sequences, logits, rows=len(questions.rows)),
            added=added,
            weights=weights,
            deltas=deltas,
        )
    finally:
        torch.set_num_threads(before)


def _check_memory(trained: Trained) -> None:
    """Refuse to load a model in float32 that the memory does not hold."""
    stored = open_checkpoint(Path(trained.base)).tensors.values()
    needed = 4 * sum(math.prod(tensor.shape) for tensor in stored)
    _, free = memory(Path("/proc"), Path("/sys"))
    if needed > free:
        raise RefusedError(
            f"To compare, the trained model is loaded in float32: {format_bytes(needed)}; "
            f"{format_bytes(free)} of memory is free.",
            "Verify on a machine with more memory; exporting itself needs little: export --no-verify",
        )


def load_trained(trained: Trained) -> tuple[Any, Any]:
    """Load tokenizer and model in float32, the adapter live.

    Raises:
        ModelError: transformers or peft cannot load it.
        RefusedError: the memory does not hold it.
    """
    _check_memory(trained)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(trained.tokenizer, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            trained.base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        if trained.adapter is not None:
            with warnings.catch_warnings():
                # peft asks transformers for names that transformers renames, and warns of shared embeddings,
                # which `_live_ends` takes care of: nothing that a person can do something about.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", UserWarning)
                model = PeftModel.from_pretrained(model, trained.adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        raise ModelError(
            f"The trained model cannot be loaded to compare with: {problem}",
            "Check the folder; for an adapter, that it belongs to this base.",
        ) from problem
    return tokenizer, model.eval()


def base_of(model: Any) -> Any:
    """Return the model within peft's, whose modules have the names of the checkpoint."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _logits(model: Any, ids: list[int]) -> Floats:
    """Return the logits of a text; those of virtual tokens before it are left out."""
    found: Floats = model(torch.tensor([ids])).logits[0, -len(ids) :].float().numpy()
    return found


def _virtual_tokens(model: Any, count: int) -> tuple[str, list[int]]:
    """Return text and ids of the virtual tokens, which come after the vocabulary."""
    size = model.config.vocab_size
    return "".join(f"<|vp_{number}|>" for number in range(count)), list(range(size, size + count))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, nothing put before or after it."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def render(tokenizer: Any, conversation: Conversation) -> str | None:
    """Return the rendered conversation, or None where there is no template or it refuses."""
    if tokenizer.chat_template is None:
        return None
    try:
        return str(
            tokenizer.apply_chat_template(
                list(conversation.messages),
                tokenize=False,
                add_generation_prompt=conversation.generation_prompt,
            )
        )
    except jinja2.TemplateError:
        return None


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    asked = Conversation(messages=({"role": "user", "content": text},))
    return token_ids(tokenizer, render(tokenizer, asked) or text)


def _sequences(tokenizer: Any, questions: Questions, samples: Samples) -> Iterator[list[int]]:
    """Yield token ids to score: held-out rows first, then the sample conversations and probe texts."""
    positions = 0
    filler: list[Conversation | str] = [
        *questions.conversations,
        " ".join(questions.texts[:40]),
        " ".join(questions.texts[40:]),
    ]
    for number, row in enumerate([*questions.rows, *filler]):
        if positions >= samples.most_positions or (
            number >= len(questions.rows) + 2 and positions >= samples.least_positions
        ):
            return
        text = row if isinstance(row, str) else render(tokenizer, row)
        if text is None and not isinstance(row, str):
            text = "\n".join(message["content"] for message in row.messages)
        ids = token_ids(tokenizer, text or "")[: min(samples.row_tokens, samples.most_positions - positions)]
        if len(ids) > 1:
            positions += len(ids)
            yield ids


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    named = model.generation_config.eos_token_id
    found = set(named) if isinstance(named, list) else {named}
    return {i for i in found | {tokenizer.eos_token_id} if i is not None}


def _greedy(model: Any, ids: list[int], count: int, ends: set[int]) -> tuple[list[int], list[float]]:
    """Continue by the likeliest token each; also return by how much it led."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return _greedy_from_scratch(model, ids, count, ends)
    given = torch.tensor([ids])
    made = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [torch.topk(step[0].float(), 2).values.tolist() for step in made.logits]
    return made.sequences[0, len(ids) :].tolist(), [first - second for first, second in best]


def _greedy_from_scratch(
    model: Any, ids: list[int], count: int, ends: set[int]
) -> tuple[list[int], list[float]]:
    """The same without a cache, whose positions peft counts without the virtual tokens."""
    made: list[int] = []
    gaps: list[float] = []
    while len(made) < count and not (made and made[-1] in ends):
        best = torch.topk(torch.from_numpy(_logits(model, ids + made)[-1]), 2)
        made.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return made, gaps


def _weights(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Callable[[], torch.Tensor]], int]:
    """Return all parameters with the adapter merged by peft, what it adds to each, and its virtual tokens."""
    if not isinstance(model, PeftModel):
        return dict(model.state_dict()), {}, 0
    if _is_prefix(model):
        return dict(model.get_base_model().state_dict()), {}, 0
    if model.active_peft_config.is_prompt_learning:
        weights = _with_prompt(model)
        return weights, {}, model.active_peft_config.num_virtual_tokens
    base = model.get_base_model()
    ends = _live_ends(base) if base.config.tie_word_embeddings else {}
    deltas: dict[str, Callable[[], torch.Tensor]] = {
        f"{name}.weight": functools.partial(module.get_delta_weight, "default")
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and not module.use_dora.get("default")
    }
    with torch.inference_mode(), warnings.catch_warnings():
        # peft warns that merging changes both ends of a shared embedding: `ends` holds what they were.
        warnings.simplefilter("ignore", UserWarning)
        weights = dict(model.merge_and_unload(safe_merge=True).state_dict()) | ends
    return {name: tensor.detach() for name, tensor in weights.items()}, deltas, 0


def _four_bits(
    trained: Trained, sequences: list[list[int]], logits: list[Floats], *, rows: int
) -> Check | None:
    """Compare the loss on the person's rows, or on sample texts where there are none."""
    recipe = four_bits.four_bit_recipe(trained)
    if recipe is None:
        return None
    texts = sequences[: rows or len(sequences)]
    merged = [four_bits.loss(values, ids) for values, ids in zip(logits, texts, strict=False)]
    before = four_bits.losses_as_trained(trained, recipe, texts)
    return four_bits.check(before, merged, texts, rows=rows > 0)


def _is_prefix(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def _cached(model: Any) -> Prefix | None:
    """Return what every text finds in the cache, in transformers' order of rows."""
    if not _is_prefix(model):
        return None
    with torch.inference_mode():
        layers = model.get_prompt(batch_size=1).layers
        keys, values = (
            np.stack([part[0].transpose(0, 1).flatten(1).float().numpy() for part in parts])
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
    return Prefix(keys=keys, values=values)


def _with_prompt(model: Any) -> dict[str, torch.Tensor]:
    """Return the base's parameters, the virtual tokens' embeddings appended; their logits are the mean."""
    base = model.get_base_model()
    layout = Layout.of({"architectures": [type(base).__name__]})
    with torch.inference_mode():
        prompt = model.get_prompt(batch_size=1)[0].float()
        inputs, head = base.get_input_embeddings(), base.get_output_embeddings().weight
        rows = prompt / inputs.embed_scale if layout.scaled_prompt else prompt
        mean = head.double().mean(0, keepdim=True).float().expand(len(prompt), -1)
        ends = {layout.embedding: torch.cat([inputs.weight, rows]), layout.head: torch.cat([head, mean])}
    return dict(base.state_dict()) | {name: tensor.clone() for name, tensor in ends.items()}


def _live_ends(base: Any) -> dict[str, torch.Tensor]:
    """Return embedding and output layer as used, where an adapter parts them: merging would mix them."""
    layout = Layout.of({"architectures": [type(base).__name__]})
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if not any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in (inputs, outputs)):
        return {}
    with torch.inference_mode():
        embedding = inputs(torch.arange(base.config.vocab_size)).float().clone()
        if layout.scaled_prompt:
            embedding /= base.config.hidden_size**0.5
        head = outputs(torch.eye(base.config.hidden_size)).float().T.clone()
    return {layout.embedding: embedding, layout.head: head}


def _led(text: str, normaliser: str | None, added: tuple[str, ...]) -> str:
    """Return a rendered conversation as the file's template writes it: the first space is said."""
    return f" {text}" if normaliser == SPACE and needs_space(text, added) else text


def prepare(text: str, normaliser: str | None, added: tuple[str, ...]) -> str:
    """Return a text as an application must give it to the file: accents composed, or a space in front."""
    return unicodedata.normalize("NFC", text) if normaliser == "NFC" else _led(text, normaliser, added)
