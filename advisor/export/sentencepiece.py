"""Is this a SentencePiece-style BPE tokenizer that llama.cpp cuts alike, and with which scores?

Goes in: tokenizer.json. Comes out: `Pieces`, from tokenizer.json alone. Never does: need
tokenizer.model; accept a way of putting spaces that llama.cpp lacks.
"""

from __future__ import annotations

from typing import Any

from advisor.errors import ExportError
from advisor.types import Record

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_REMEDY = "This tokenizer cannot be a GGUF; export --to merged and run it with transformers or vLLM."
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
