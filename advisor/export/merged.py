"""The trained parameters, row by row: base and adapter together, in the orientation of the file.

Goes in: the base's checkpoint, an adapter. Comes out: float32 rows of any parameter. Never does: hold a whole
model in memory; use quantised base weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from advisor.errors import ExportError, ModelError
from advisor.export.adapter import Adapter
from advisor.export.checkpoint import Checkpoint, Floats, Rows, open_checkpoint
from advisor.export.config_fields import is_tied
from advisor.gguf_rules import Architecture, rules

_EVERYTHING = slice(None)
_PART_ROWS = 4096
_WRONG_BASE = "Name the base model that the adapter was trained on."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What has to be known of an architecture to read its checkpoints."""

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    prefix: str = ""
    transposed: tuple[str, ...] = ()
    scaled_prompt: bool = False

    @staticmethod
    def of(config: dict[str, Any]) -> Layout:
        """Return the layout that config.json's architecture has; the usual one where it is not known."""
        known: Architecture | None = rules().architectures.get((config.get("architectures") or [""])[0])
        if known is None:
            return Layout()
        return Layout(
            embedding=known.embedding, head=known.head_weight, prefix=known.prefix,
            transposed=tuple(f".{module}.weight" for module in known.transposed),
            scaled_prompt=known.scaled_prompt,
        )  # fmt: skip


class Merged:
    """The trained parameters: base and adapter, or a base alone."""

    def __init__(self, base: Checkpoint, adapter: Adapter | None, *, config: dict[str, Any]) -> None:
        self.layout = Layout.of(config)
        self._base = _prefixed(base, self.layout.prefix)
        self._adapter = adapter
        self._saved = {} if adapter is None else dict(adapter.saved)
        self._tied = is_tied(config) and not self._stored_apart()
        self.own_head = not self._tied
        self.prompt = _prompt(adapter, config, scaled=self.layout.scaled_prompt)
        """Embeddings of virtual tokens, as rows to append to the embedding."""
        if adapter is not None:
            self._check(adapter)
            self.own_head = self.own_head or self._unties(adapter) or adapter.prompt is not None

    def _stored_apart(self) -> bool:
        """Whether the checkpoint holds an output layer that is not the embedding: transformers takes both."""
        embedding, head = (self._base.tensors.get(name) for name in (self.layout.embedding, self.layout.head))
        if embedding is None or head is None or embedding.shape != head.shape:
            return False
        parts = (slice(start, start + _PART_ROWS) for start in range(0, head.shape[0], _PART_ROWS))
        return not all(
            np.array_equal(
                self._base.rows(self.layout.embedding, part), self._base.rows(self.layout.head, part)
            )
            for part in parts
        )

    def names(self) -> set[str]:
        """Return every parameter that must find a place in the file."""
        return set(self._base.tensors) | set(self._saved)

    def is_transposed(self, name: str) -> bool:
        """Whether transformers stores this parameter as (in, out)."""
        return name.endswith(self.layout.transposed) if self.layout.transposed else False

    def dtype(self, name: str) -> str:
        """Return the type in which the base stores a parameter, as safetensors names it."""
        stored = self._base.tensors.get(self._source(name))
        return stored.dtype if stored else "F32"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter as (out, in), or an empty one where there is none."""
        if name in self._saved:
            found = self._saved[name].shape
        else:
            stored = self._base.tensors.get(self._source(name))
            found = stored.shape if stored else ()
        if self.prompt is not None and name in (self.layout.embedding, self.layout.head) and found:
            return (found[0] + len(self.prompt), *found[1:])
        return found[::-1] if self.is_transposed(name) else found

    def rows(self, name: str, rows: Rows = _EVERYTHING) -> Floats:
        """Return rows of a trained parameter in float32, (out, in)."""
        if self.prompt is not None and name in (self.layout.embedding, self.layout.head):
            return self._longer(name, rows, self.prompt)
        return self._rows(name, rows)

    def _rows(self, name: str, rows: Rows) -> Floats:
        turned = self.is_transposed(name)
        if name in self._saved:
            weight = (self._saved[name].T if turned else self._saved[name])[rows]
        else:
            weight = self._base.rows(self._source(name), rows, transposed=turned)
        module, _, kind = name.rpartition(".")
        if self._adapter is None:
            return weight
        if self._tied and not self.own_head_trained and name == self.layout.head:
            module = self.layout.embedding.rpartition(".")[0]
        for changes in (self._adapter.deltas, self._adapter.scales, self._adapter.tokens):
            change = changes.get(module)
            if change is not None:
                weight = change.bias(weight, rows) if kind == "bias" else change.rows(weight, rows)
        return weight

    @property
    def own_head_trained(self) -> bool:
        """Whether training itself parted output layer and embedding."""
        return self._adapter is not None and self._unties(self._adapter)

    def _longer(self, name: str, rows: Rows, prompt: Floats) -> Floats:
        """Return rows of the embedding with the virtual tokens', or of the output layer with their means.

        The mean of all logits is never the largest, so that no virtual token is ever the likeliest.
        """
        count = self.shape(name)[0] - len(prompt)
        asked = np.arange(*rows.indices(count + len(prompt))) if isinstance(rows, slice) else rows
        inside = asked[asked < count]
        found = np.empty((len(asked), prompt.shape[1]), dtype=np.float32)
        if len(inside):
            found[asked < count] = self._rows(name, inside)
        if len(inside) < len(asked):
            if name == self.layout.embedding:
                found[asked >= count] = prompt[asked[asked >= count] - count]
            else:
                found[asked >= count] = self._mean(name, count)
        return found

    def _mean(self, name: str, count: int) -> Floats:
        total = np.zeros(self.shape(name)[1], dtype=np.float64)
        for start in range(0, count, _PART_ROWS):
            total += self._rows(name, slice(start, min(start + _PART_ROWS, count))).sum(
                axis=0, dtype=np.float64
            )
        return np.asarray(total / count, dtype=np.float32)

    def _source(self, name: str) -> str:
        """The output layer of a tied model starts from the embedding."""
        return self.layout.embedding if name == self.layout.head and self._tied else name

    def _unties(self, adapter: Adapter) -> bool:
        """Whether embedding and output layer differ afterwards, where the base shares them."""
        if not self._tied or adapter.ties_weights:
            return False
        ends = {self.layout.embedding, self.layout.head}
        changed = {f"{module}.weight" for module in (*adapter.deltas, *adapter.scales)} | set(adapter.saved)
        return bool(ends & changed)

    def _check(self, adapter: Adapter) -> None:
        for module, delta in adapter.deltas.items():
            if delta.a is None or delta.b is None:
                raise ModelError(f"The adapter holds only half of what it changes in {module}.", _WRONG_BASE)
            self._check_place(module, delta.shape())
            if delta.b_bias is not None and not self.shape(f"{module}.bias"):
                raise ExportError(
                    f"The adapter trains a bias of {module}, which the base lacks.",
                    "Train without lora_bias, or on a base with biases.",
                )
        for module, scale in adapter.scales.items():
            rows, columns = self.shape(f"{module}.weight") or (0, 0)
            size = len(scale.values)
            self._check_place(module, (rows, size) if scale.incoming else (size, columns))
        for name, values in adapter.saved.items():
            source = self._base.tensors.get(self._source(name))
            if source is not None and source.shape != values.shape:
                raise ExportError(
                    f"The adapter replaces {name} of shape {source.shape} by {values.shape}.",
                    "Merge it with peft and save the model with its new config.json, then export that.",
                )
        if self._tied and adapter.ties_weights:
            self._check_tying(adapter)

    def _check_place(self, module: str, given: tuple[int, ...]) -> None:
        shape = self.shape(f"{module}.weight")
        if not shape:
            raise ModelError(f"The adapter changes {module}, which the base lacks.", _WRONG_BASE)
        if given != shape:
            raise ModelError(
                f"The adapter changes {module} as {given}, but the base has {shape}: "
                "it belongs to another base.",
                _WRONG_BASE,
            )

    def _check_tying(self, adapter: Adapter) -> None:
        embedding, head = self.layout.embedding, self.layout.head
        low_rank = {f"{module}.weight" for module in adapter.deltas} & {embedding, head}
        first, second = adapter.saved.get(embedding), adapter.saved.get(head)
        if low_rank or (second is not None and (first is None or not np.array_equal(first, second))):
            raise ExportError(
                "The adapter changes the shared embedding with ensure_weight_tying; not merged here.",
                "Merge it with peft (merge_and_unload), save the model and export that folder.",
            )
        self._saved.pop(head, None)


def open_merged(base: Path, adapter: Adapter | None, config: dict[str, Any]) -> Merged:
    """Open a base with its adapter.

    Raises:
        ModelError: the base is incomplete, or the adapter belongs to another.
        ExportError: the adapter cannot be merged exactly.
    """
    return Merged(open_checkpoint(base), adapter, config=config)


def _prefixed(base: Checkpoint, prefix: str) -> Checkpoint:
    """Return a checkpoint that was saved without its prefix under its full names."""
    if not prefix or any(name.startswith(prefix) for name in base.tensors):
        return base
    own = ("lm_head.",)
    return Checkpoint(
        {name if name.startswith(own) else prefix + name: stored for name, stored in base.tensors.items()}
    )


def _prompt(adapter: Adapter | None, config: dict[str, Any], *, scaled: bool) -> Floats | None:
    if adapter is None or adapter.prompt is None:
        return None
    if not scaled:
        return adapter.prompt
    # The embedding layer multiplies what it looks up; virtual tokens come after it.
    return np.asarray(adapter.prompt / np.float32(np.sqrt(config["hidden_size"])), dtype=np.float32)
