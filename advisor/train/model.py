"""Loads the base model and its tokenizer as the recipe says, and makes them agree on the end of a turn.

Goes in: a recipe's model and settings. Comes out: a tokenizer and a model with explicit number formats. Never
does: use the network (the supervisor fetched the files), run code that came with a model, add rows to an
embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from advisor.errors import ModelError
from advisor.resources import starter_dir
from advisor.train.parallel import local_device
from advisor.train.settings import Settings
from advisor.types import RecipeModel, Record

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}


class Ending(Record, frozen=True, kw_only=True):
    """The tokens that end and fill a row."""

    end: str
    end_id: int
    pad: str
    pad_id: int
    call_end_id: int | None = None
    """What ends a tool call, where it is another token."""
    changed: tuple[str, ...]
    """What had to be set because the files said otherwise, in plain words."""


def model_place(model: RecipeModel) -> str:
    """Return the folder or hub id to load weights from; `starter` is the embedded model, and a stage that
    follows a fully tuned one begins with its weights."""
    if model.after is not None and (Path(model.after) / "model").is_dir():
        return str(Path(model.after) / "model")
    if model.after is not None and start_adapter(model) is None:
        raise ModelError(
            f"{model.after} holds neither model/ nor adapter/, so there is nothing to go on from.",
            "Put it back, or train the stage before this one again.",
        )
    if "starter" in (model.path, model.id):
        return str(starter_dir())
    return model.path or model.id


def start_adapter(model: RecipeModel) -> Path | None:
    """Return the adapter of the earlier stage that this one goes on with."""
    if model.after is None or not (Path(model.after) / "adapter").is_dir():
        return None
    return Path(model.after) / "adapter"


def load_tokenizer(model: RecipeModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer.

    Raises:
        ModelError: its files are missing or unusable.
    """
    try:
        place = start_adapter(model) or model_place(model)
        return AutoTokenizer.from_pretrained(place, revision=model.revision)
    except (OSError, ValueError) as problem:
        raise ModelError(
            f"The tokenizer of {model.id} cannot be loaded: {first_line(problem)}",
            "Check the model folder, or plan again with another --model.",
        ) from problem


def load_model(
    model: RecipeModel,
    settings: Settings,
    *,
    biases: bool = False,
    labels: int = 0,
    sharded: bool = False,
) -> PreTrainedModel:
    """Load the base with the weights as `weight_bits` says: 4 as NF4, 16 in the 16-bit format of `precision`,
    32 as fp32.

    Args:
        model: of the recipe.
        settings: of the recipe.
        biases: add biases of zero to a family that has a place for them everywhere, and none of its own.
        labels: with this many outputs instead of a vocabulary; 0: a language model.
        sharded: its weights will be spread over several devices.

    Raises:
        ModelError: its files are missing or unusable, or the architecture is unknown.
    """
    place, cuda = model_place(model), torch.cuda.is_available()
    quantisation = _nf4(settings, sharded=sharded) if settings.weight_bits == 4 else None
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    more: dict[str, Any] = {"num_labels": labels} if labels else {}
    try:
        loaded = kind.from_pretrained(
            place,
            **more,
            **(_bias_switches(model) if biases else {}),
            revision=model.revision,
            # A head is trained in 32 bits; without autocast what it reads must be so too.
            dtype=torch.float32 if labels and settings.precision == "fp32" else base_dtype(settings),
            attn_implementation=ATTENTION[settings.attention],
            quantization_config=quantisation,
            device_map=local_device() if quantisation is not None and cuda and not sharded else None,
        )
    except (OSError, ValueError, KeyError, ImportError) as problem:
        raise ModelError(
            f"The model {model.id} cannot be loaded: {first_line(problem)}",
            "Check the model folder, or plan again with another --model.",
        ) from problem
    loaded.config.use_cache = False
    if quantisation is not None:
        keep_trainable_on_cpu(loaded)
    return loaded


def _bias_switches(model: RecipeModel) -> dict[str, bool]:
    """Return what switches biases on in every linear layer, where the family knows both switches."""
    config = AutoConfig.from_pretrained(model_place(model), revision=model.revision).to_dict()
    names = ("attention_bias", "mlp_bias")
    return dict.fromkeys(names, True) if all(config.get(name) is False for name in names) else {}


def keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on CPU in the layout that gradients pass through.

    On processors with AVX512-BF16, bitsandbytes 0.50 repacks a layer for inference at its first forward pass
    in evaluation mode and never turns back; its kernel for that layout has no gradient, so that a model which
    was evaluated once trains on with gradients that silently lack everything behind it."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def base_dtype(settings: Settings) -> torch.dtype:
    """Return the number format in which weights that are not quantised are held."""
    if settings.weight_bits == 32:
        return torch.float32
    return torch.float16 if settings.precision == "fp16" else torch.bfloat16


def _nf4(settings: Settings, *, sharded: bool) -> BitsAndBytesConfig:
    """Return what loads the base in 4 bits.

    Bytes are not spread over devices, so for sharding the packed weights pose as the format of the others."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=DTYPES[settings.precision],
        bnb_4bit_quant_storage=base_dtype(settings) if sharded else torch.uint8,
    )


def embedding_rows(model: RecipeModel) -> int:
    """Return how many token ids the model has a row for, without loading it."""
    config = AutoConfig.from_pretrained(model_place(model), revision=model.revision)
    return int(config.get_text_config().vocab_size)


def settle_ending(
    tokenizer: PreTrainedTokenizerBase, end: str, *, rows: int, call_end: str | None = None
) -> Ending:
    """Make `end` the tokenizer's end token and give it a padding token that is another one.

    A token that the model never uses is preferred for padding; a new one is added only where the embedding
    has a spare row for it, since new rows would not fit the base any more. Where neither exists, padding
    stays the end token, which is harmless here: labels and attention are built per row, not from the padding.

    Args:
        tokenizer: changed in place.
        end: the template's end-of-turn token.
        rows: rows of the embedding.
        call_end: what ends a tool call, where it is another token.
    """
    changed = []
    if tokenizer.eos_token != end:
        changed.append(f"end token {tokenizer.eos_token!r} -> {end!r}")
        tokenizer.eos_token = end
    before = tokenizer.pad_token
    if before is None or before == end:
        pad = _spare_token(tokenizer, end)
        if pad is None and len(tokenizer) < rows:
            pad = "<|pad|>"
            tokenizer.add_special_tokens({"pad_token": pad})
        changed.append(f"padding token {before!r} -> {pad or end!r}")
        tokenizer.pad_token = pad or end
    return Ending(
        end=end,
        end_id=tokenizer.convert_tokens_to_ids(end),
        pad=tokenizer.pad_token,
        pad_id=tokenizer.convert_tokens_to_ids(tokenizer.pad_token),
        call_end_id=None if call_end is None else tokenizer.convert_tokens_to_ids(call_end),
        changed=tuple(changed),
    )


def apply_ending(model: PreTrainedModel, ending: Ending) -> None:
    """Write the end and padding tokens into the model's and the generation configuration."""
    configs = [model.config.get_text_config()]
    if model.can_generate():
        configs.append(model.generation_config)
    for config in configs:
        config.eos_token_id = ending.end_id
        config.pad_token_id = ending.pad_id
    if model.can_generate() and ending.call_end_id is not None:
        model.generation_config.eos_token_id = [ending.end_id, ending.call_end_id]


def _spare_token(tokenizer: PreTrainedTokenizerBase, end: str) -> str | None:
    """Return an existing special token that stands for nothing: named padding, reserved, or the unknown
    token."""
    special: list[str] = [
        t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content != end
    ]
    free = [token for token in special if token != tokenizer.bos_token]
    for word in ("pad", "reserved", "unused", "extra_id"):
        for token in free:
            if word in token.lower():
                return token
    return next((token for token in free if token == str(tokenizer.unk_token)), None)


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's text."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
