"""Can llama.cpp cut text as this tokenizer does, and what must it be told?

Goes in: tokenizer.json, tokenizer_config.json, the model type. Comes out: the steps in llama.cpp's words, or
what it cannot do. Never does: read weights; guess a pre-tokenizer; need tokenizer.model.
"""

from __future__ import annotations

from typing import Any

from advisor.errors import ExportError
from advisor.gguf_rules import rules
from advisor.types import Record

_REMEDY = "This tokenizer cannot be a GGUF; export --to merged and run it with transformers or vLLM."
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_NEVER_MERGED = 0.0


class Pieces(Record, frozen=True, kw_only=True):
    """What llama.cpp needs besides the tokens."""

    add_space_prefix: bool
    """A space is put before every stretch of text between special tokens."""
    first_space: bool = False
    """A space is put before the very first stretch alone, which llama.cpp does not do."""
    ranks: dict[str, int]
    """Token -> place of the first merge that makes it."""

    def score(self, token: str) -> float:
        """Return the score by which llama.cpp decides what to merge first."""
        rank = self.ranks.get(token)
        return _NEVER_MERGED if rank is None else -float(rank)


def obstacle(data: dict[str, Any], settings: dict[str, Any], model_type: str) -> str:
    """Return why llama.cpp cannot cut text as this tokenizer does, or nothing.

    Args:
        data: tokenizer.json.
        settings: tokenizer_config.json.
        model_type: Of config.json.
    """
    try:
        Cuts.of(as_loaded(data, settings, model_type))
    except ExportError as refused:
        return refused.message
    return ""


class Cuts(Record, frozen=True, kw_only=True):
    """How text is cut, in llama.cpp's words."""

    pieces: Pieces | None
    """SentencePiece-style; None: byte-level."""
    pre: str
    normaliser: str | None
    strips: bool
    """Special tokens swallow the spaces after them."""
    starts: str | None
    """Put before every text."""
    ends: str | None

    @staticmethod
    def of(data: dict[str, Any]) -> Cuts:
        """Read the steps of tokenizer.json, as `as_loaded` returns it.

        Raises:
            ExportError: llama.cpp does not do one of them; the reason is given.
        """
        pieces = read_pieces(data)
        starts, ends = _post_processor(data.get("post_processor"))
        _check_matching(data)
        return Cuts(
            pieces=pieces,
            pre=_pre_tokenizer(data) if pieces is None else "default",
            normaliser=_normaliser(data.get("normalizer")) if pieces is None else None,
            strips=_strips(data), starts=starts, ends=ends,
        )  # fmt: skip


def _check_matching(data: dict[str, Any]) -> None:
    for token in data.get("added_tokens", []):
        strict = [flag for flag in ("single_word", "lstrip") if token.get(flag)]
        if strict:
            raise ExportError(
                f"The token {token['content']!r} is matched with {', '.join(strict)}; llama.cpp does not.",
                _REMEDY,
            )


def as_loaded(data: dict[str, Any], settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return tokenizer.json with the steps that the tokenizer's class puts in the place of its own.

    Args:
        data: tokenizer.json.
        settings: tokenizer_config.json.
        model_type: Of config.json.
    """
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    bytewise = bool(data["model"].get("byte_fallback"))
    for name, facts in rules().tokenizer_classes.items():
        declared = named == name and model_type in facts.where_named
        if model_type not in facts.always and not (declared and bytewise in (True, facts.byte_fallback)):
            continue
        model = {**data["model"], "byte_fallback": facts.byte_fallback, "fuse_unk": facts.byte_fallback}
        if not facts.byte_fallback:
            model["unk_token"] = None
        changed = {**data, "model": model, "normalizer": facts.normalizer}
        return {**changed, "pre_tokenizer": _with_spaces(facts.pre_tokenizer, settings)}
    return data


def _with_spaces(steps: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the steps with the way of putting a space in front that tokenizer_config.json asks for."""
    if "prepend_scheme" not in steps:
        return steps
    if settings.get("add_prefix_space") is False:
        return {**steps, "prepend_scheme": "never"}
    return {**steps, "prepend_scheme": "always"} if settings.get("legacy") else steps


def read_pieces(data: dict[str, Any]) -> Pieces | None:
    """Return the pieces of a SentencePiece-style BPE, or None where the tokenizer is of another kind.

    Raises:
        ExportError: it is one, but puts spaces or handles unknown characters as llama.cpp does not.
    """
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        return None
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    vocab = model["vocab"]
    bytes_missing = [value for value in range(256) if f"<0x{value:02X}>" not in vocab]
    if odd or bytes_missing or model.get("ignore_merges"):
        what = ", ".join(odd) or (f"{len(bytes_missing)} byte tokens missing" if bytes_missing else "merges")
        raise ExportError(f"The SentencePiece-style tokenizer is not llama.cpp's: {what}.", _REMEDY)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(first + second, rank)
    spaces = _spaces(data.get("normalizer"), data.get("pre_tokenizer"))
    return Pieces(add_space_prefix=spaces == "every", first_space=spaces == "first", ranks=ranks)


def _spaces(normaliser: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> str:
    """Return which stretches of text get a space in front: `every`, `first`, or `none`."""
    steps = _described(normaliser, "normalizers") + _described(pre_tokenizer, "pretokenizers")
    known = {
        ("prepend", "replace"): "every",
        ("replace",): "none",
        ("replace", "split after spaces"): "none",
        ("metaspace never",): "none",
        ("metaspace first",): "first",
    }
    if steps not in known:
        raise ExportError(
            f"The SentencePiece-style tokenizer prepares text by: {', '.join(steps) or 'nothing'}. llama.cpp "
            "puts a space before every stretch of text or before none.",
            _REMEDY,
        )
    return known[steps]


def _described(given: dict[str, Any] | None, name: str) -> tuple[str, ...]:
    if given is None:
        return ()
    return tuple(_step(part) for part in (given[name] if given["type"] == "Sequence" else [given]))


def _step(part: dict[str, Any]) -> str:
    """Return a step in words that are equal where it does the same."""
    kind = part["type"]
    pattern = (part.get("pattern") or {}).get("String")
    if kind == "Prepend" and part.get("prepend") == _SPACE:
        return "prepend"
    if kind == "Replace" and pattern == " " and part.get("content") == _SPACE:
        return "replace"
    if kind == "Split" and pattern == " " and part.get("behavior") == "MergedWithPrevious":
        # After the spaces were replaced it finds none.
        return "split after spaces"
    if kind == "Metaspace" and part.get("replacement") == _SPACE and not part.get("split", True):
        return f"metaspace {part.get('prepend_scheme', 'always')}"
    return f"{kind} { ({key: value for key, value in part.items() if key != 'type'}) }"


def _strips(data: dict[str, Any]) -> bool:
    """Whether special tokens swallow the spaces after them, as llama.cpp lets them in Phi-3.

    Raises:
        ExportError: some do and others do not, in another way.
    """
    facts = rules().stripping
    added = {token["content"]: bool(token.get("rstrip")) for token in data.get("added_tokens", [])}
    special = {token["content"] for token in data.get("added_tokens", []) if token.get("special")}
    if not any(added.values()):
        return False
    usual = {text: text not in facts.never and (text in special or text in facts.always) for text in added}
    named = set(facts.never) | set(facts.always)
    differing = sorted(text for text in added if added[text] != usual[text])
    missing = sorted(named - set(data["model"]["vocab"]) - set(added))
    if differing or missing:
        raise ExportError(
            f"The token {(differing or missing)[0]!r} is matched with rstrip otherwise than in llama.cpp.",
            _REMEDY,
        )
    return True


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way this tokenizer cuts text before the merges."""
    model = data["model"]
    kind = model.get("type", "BPE")
    odd = [
        key
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token")
        if model.get(key)
    ]
    if kind != "BPE" or model.get("byte_fallback") or odd:
        what = kind if kind != "BPE" else "BPE with " + ", ".join(odd or ["byte fallback"])
        raise ExportError(
            f"The tokenizer is {what}; BPE can be exported here, byte-level or with byte fallback.", _REMEDY
        )
    from tokenizers.pre_tokenizers import ByteLevel

    missing = [text for text in ByteLevel.alphabet() if text not in model["vocab"]]
    if missing:
        raise ExportError(
            f"The tokenizer is read as byte-level BPE, but its vocabulary lacks {len(missing)} of 256 bytes.",
            "Save the tokenizer that the model was trained with; transformers decides by the model's family.",
        )
    steps, pattern = _steps(data.get("pre_tokenizer"))
    for name, facts in rules().pre_tokenizers.items():
        if facts.steps == steps and facts.pattern == pattern:
            return name
    raise ExportError(
        f"llama.cpp has no pre-tokenizer that cuts text like this one: {' then '.join(steps) or 'none'}"
        + (f" with the pattern {pattern!r}." if pattern else "."),
        _REMEDY,
    )


def _steps(given: dict[str, Any] | None) -> tuple[tuple[str, ...], str | None]:
    if given is None:
        return (), None
    parts = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    steps, pattern = [], None
    for part in parts:
        kind = part["type"]
        flags = [key for key in ("use_regex", "individual_digits", "add_prefix_space") if part.get(key)]
        if kind == "Split":
            pattern = part["pattern"].get("Regex")
            if part.get("behavior") != "Isolated" or part.get("invert") or pattern is None:
                flags.append(f"behavior {part.get('behavior')}")
        shown = ", ".join(flag.removesuffix("_digits") for flag in flags)
        steps.append(f"{kind}({shown})" if shown else kind)
    return tuple(steps), pattern


def _normaliser(given: dict[str, Any] | None) -> str | None:
    parts = [] if given is None else given["normalizers"] if given["type"] == "Sequence" else [given]
    kinds = [part["type"] for part in parts]
    if kinds not in ([], ["NFC"]):
        raise ExportError(
            f"The tokenizer normalises text ({', '.join(kinds)}), which llama.cpp does not do.", _REMEDY
        )
    return "NFC" if kinds else None


def _post_processor(given: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Return the tokens that are put before and after every text, or None."""
    parts = [] if given is None else given["processors"] if given["type"] == "Sequence" else [given]
    starts = ends = None
    for part in parts:
        if part["type"] == "ByteLevel":
            continue
        if part["type"] != "TemplateProcessing":
            raise ExportError(
                f"The tokenizer ends with the step {part['type']}, which is not known here.", _REMEDY
            )
        around = [
            next(iter(item.values())).get("id") if "SpecialToken" in item else None for item in part["single"]
        ]
        text = around.index(None)
        if text > 1 or len(around) - text > 2:
            raise ExportError("The tokenizer adds more than one token before or after a text.", _REMEDY)
        starts = around[0] if text else starts
        ends = around[-1] if text < len(around) - 1 else ends
    return starts, ends
