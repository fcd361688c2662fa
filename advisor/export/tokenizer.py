"""Turns a trained BPE tokenizer, byte-level or SentencePiece-style, into the fields of a GGUF file.

Goes in: tokenizer.json, tokenizer_config.json, the chat template. Comes out: `Vocabulary`. Never does:
guess a pre-tokenizer; drop a step that llama.cpp lacks without saying so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import msgspec

from advisor.errors import ExportError, ModelError
from advisor.export.chat_template import Conversation, end_of_turn, read_template, render, token_text
from advisor.export.checkpoint import optional_json, read_json
from advisor.gguf_rules import rules
from advisor.gguf_tokenizer import Cuts, as_loaded
from advisor.templates import strip_generation_markers
from advisor.types import Record

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    int(getattr(gguf.TokenType, name))
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
)
SPACE = "space"
"""A normaliser: a space before a text that does not begin with a special token."""
_COMPOSES = (
    "the tokenizer composes accents first (NFC) and llama.cpp does not: `ftadvisor chat` does it instead"
)


class Vocabulary(Record, frozen=True, kw_only=True):
    """A tokenizer as llama.cpp reads it."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    """SentencePiece-style: the higher, the earlier merged."""
    add_space_prefix: bool = False
    unknown: int | None = None
    strips: bool = False
    """Special tokens swallow the spaces after them."""
    bos: int | None
    eos: int
    pad: int | None
    eot: int
    end_ids: tuple[int, ...]
    """Every token that ends a turn, the trained one first."""
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    virtual: int = 0
    """So many of the last tokens stand before every text and are never said."""
    normaliser: str | None = None
    """What the trained tokenizer does to text first and llama.cpp does not: NFC, or SPACE."""
    plain_only: bool = False
    """Cut alike only where no special token stands in the text and no space before it."""
    notes: tuple[str, ...] = ()

    @property
    def end_texts(self) -> tuple[str, ...]:
        """Return the texts of `end_ids`."""
        return tuple(self.tokens[i] for i in self.end_ids)


def read_vocabulary(tokenizer: Path, model: Path, *, rows: int) -> Vocabulary:
    """Read the tokenizer in one folder for the model in another (often the same).

    Args:
        tokenizer: folder with tokenizer.json, tokenizer_config.json and the chat template.
        model: folder with config.json and perhaps generation_config.json.
        rows: rows of the embedding; the tokens are padded to it.

    Raises:
        ExportError: llama.cpp cannot cut text as this tokenizer does; the reason is given.
        ModelError: there is no tokenizer.json.
    """
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{tokenizer} has no tokenizer.json.",
            "Load the tokenizer with transformers and save_pretrained it.",
        )
    settings = optional_json(tokenizer / "tokenizer_config.json")
    model_type = str(optional_json(model / "config.json").get("model_type", ""))
    data = as_loaded(read_json(path), settings, model_type)
    cuts = Cuts.of(data)
    pieces, normaliser = cuts.pieces, cuts.normaliser
    notes: tuple[str, ...] = (_COMPOSES,) if normaliser == "NFC" else ()
    unknown = data["model"].get("unk_token") or token_text(settings, "unk_token") or ""
    tokens, types = _tokens(data, rows, unknown=None if pieces is None else unknown)
    ids = {text: i for i, text in enumerate(tokens)}
    template = read_template(tokenizer)
    plain = None if template is None else strip_generation_markers(template)
    starts = cuts.starts
    bos = _special(settings, "bos_token", ids) if starts is None else ids.get(starts)
    eos = _special(settings, "eos_token", ids)
    end_ids = _end_ids(plain, settings, model, ids, eos)
    add_bos = starts is not None
    first = "" if plain is None else render(plain, settings, Conversation.samples()[0])
    if add_bos and plain is not None and not first.startswith(str(starts)):
        add_bos = False
        notes += (f"{starts} is not put before a prompt by itself: the chat template was trained without it",)
    every, once = (False, False) if pieces is None else (pieces.add_space_prefix, pieces.first_space)
    if once and plain is not None:
        normaliser = SPACE
        plain = f"{{{{ ' ' }}}}{plain}" if needs_space(first, added_texts(data)) else plain
        notes += ("a raw prompt must begin with a space, which the trained tokenizer put there by itself",)
    elif once:
        notes += ("spaces after special tokens are cut differently: the trained tokenizer puts in none",)
    return Vocabulary(
        model="gpt2" if pieces is None else "llama", pre=cuts.pre, tokens=tokens, types=types,
        merges=_merges(data) if pieces is None else (),
        scores=() if pieces is None else tuple(map(pieces.score, tokens)),
        add_space_prefix=every or (once and plain is None), plain_only=once and plain is None,
        unknown=ids.get(unknown), strips=cuts.strips, bos=bos, eos=end_ids[0] if eos is None else eos,
        pad=_special(settings, "pad_token", ids), eot=_end_slot(end_ids, tokens, eos), end_ids=end_ids,
        add_bos=add_bos, add_eos=cuts.ends is not None, chat_template=plain, normaliser=normaliser,
        notes=notes,
    )  # fmt: skip


def with_virtual_tokens(vocabulary: Vocabulary, count: int) -> Vocabulary:
    """Return the vocabulary with control tokens for a trained prompt, which the template puts first.

    Raises:
        ExportError: a token of that name exists.
    """
    if not count:
        return vocabulary
    added = tuple(f"<|vp_{number}|>" for number in range(count))
    if set(added) & set(vocabulary.tokens):
        raise ExportError("The tokenizer already has virtual tokens.", "Export from the base model's folder.")
    template = vocabulary.chat_template
    note = f"{count} virtual tokens stand before every conversation; a raw prompt must begin with them"
    return msgspec.structs.replace(
        vocabulary,
        tokens=vocabulary.tokens + added,
        types=vocabulary.types + (CONTROL,) * count,
        scores=vocabulary.scores + (0.0,) * count if vocabulary.scores else (),
        chat_template=None if template is None else f"{{{{ '{''.join(added)}' }}}}{template}",
        add_bos=False,
        virtual=count,
        notes=(*vocabulary.notes, note),
    )


def added_texts(data: dict[str, Any]) -> tuple[str, ...]:
    """Return the texts that tokenizer.json cuts out before anything else."""
    return tuple(token["content"] for token in data.get("added_tokens", []))


def needs_space(text: str, special: tuple[str, ...]) -> bool:
    """Whether a tokenizer that puts a space before the first stretch of text alone puts one here."""
    return bool(text) and not text.startswith((" ", *special))


def _special(settings: dict[str, Any], name: str, ids: dict[str, int]) -> int | None:
    text = token_text(settings, name)
    return None if text is None else ids.get(text)


def _end_ids(
    template: str | None, settings: dict[str, Any], model: Path, ids: dict[str, int], eos: int | None
) -> tuple[int, ...]:
    """Return every end token: the template's end of turn, the tokenizer's, the generation settings'."""
    found: list[int] = []
    if template is not None:
        text = end_of_turn(template, settings, [text for text in ids if text])
        if text is not None:
            found.append(ids[text])
    if eos is not None:
        found.append(eos)
    for file in ("generation_config.json", "config.json"):
        value = optional_json(model / file).get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    found = [i for i in dict.fromkeys(found) if 0 <= i < len(ids)]
    if not found:
        raise ExportError(
            "The tokenizer names no end token and the chat template ends no turn: "
            "generation would never stop.",
            "Set eos_token in tokenizer_config.json to the token that the training data ends with.",
        )
    return tuple(found)


def _end_slot(end_ids: tuple[int, ...], tokens: tuple[str, ...], eos: int | None) -> int:
    """Return the id for the end-of-turn slot: one that llama.cpp does not know by its text, or the first."""
    known = set(rules().end_tokens.known)
    named = end_ids[0] if eos is None else eos
    strange = [i for i in end_ids if tokens[i] not in known and i != named]
    if len(strange) > 1:
        raise ExportError(
            f"The model ends turns with {', '.join(repr(tokens[i]) for i in end_ids)}; a GGUF can name two "
            "end tokens that llama.cpp does not know by their text.",
            "Leave the end tokens that were not trained out of generation_config.json.",
        )
    return strange[0] if strange else end_ids[0]


def _tokens(
    data: dict[str, Any], rows: int, *, unknown: str | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return texts and types; `unknown` is given for SentencePiece-style tokenizers alone."""
    vocab: dict[str, int] = data["model"]["vocab"]
    added = data.get("added_tokens", [])
    texts: dict[int, str] = {i: text for text, i in vocab.items()}
    types = dict.fromkeys(texts, NORMAL)
    if unknown is not None:
        types |= {vocab[f"<0x{value:02X}>"]: BYTE for value in range(256)}
    for token in added:
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    if max(texts) >= rows:
        raise ModelError(
            f"The tokenizer has a token with id {max(texts)}, but the embedding has only {rows} rows.",
            "The tokenizer belongs to another model; put the right one beside the weights.",
        )
    free = [i for i in range(rows) if i not in texts]
    texts |= {i: f"[unused_{i}]" for i in free}
    types |= dict.fromkeys(free, UNUSED)
    return tuple(texts[i] for i in range(rows)), tuple(types[i] for i in range(rows))


def _merges(data: dict[str, Any]) -> tuple[str, ...]:
    return tuple(m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"])
