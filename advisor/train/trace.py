"""How much memory would two training steps hold, by the libraries that are installed here?

    python -P -m advisor.train.trace < questions.jsonl

Goes in: JSON lines, each with `spec` (ModelSpec) and `settings` (MemorySettings). Comes out: a JSON line for
each (TracedPeaks), with the bytes held at the peak of `forward`, `backward` and `optimizer` of the second
step, and `steady` before it. A deep model is traced at a few smaller depths: what a block adds does not
depend on how many there are. Never does: allocate (the model lies on the meta device), read weights, use a
GPU or the network.

The model, its checkpointing, the adapters and TRL's loss are the real ones. Stand-ins take the place of what
the meta device cannot run: attention kernels, NF4 matrices, autocast, and the fused optimizer."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec
import torch
from msgspec import structs
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import advisor.train.trace_alone  # noqa: F401 - before anything that imports PEFT
from advisor.errors import RefusedError
from advisor.train.trace_model import build, in_tiles, mixed, sequences
from advisor.train.trace_standins import Autocast, prepare
from advisor.types import MemorySettings, ModelSpec, Record, TracedPeaks

TUNERS = (
    "full", "lora", "qlora", "dora", "osf", "ia3", "ln_tuning", "prompt_tuning", "p_tuning", "prefix_tuning",
)  # fmt: skip
OBJECTIVES = ("sft", "cpt", "dpo", "kto", "orpo", "simpo", "reward")


WHOLE_BLOCKS = 48
"""A model of more blocks is traced at smaller depths."""
DEPTHS = (4, 8, 12, 24)
"""The third must grow as the second did, else the next: then no other moment has become the fullest."""
SAME_GROWTH = 0.002
BACKWARD = ("head", "last", "middle", "first")
"""Parts of the backward pass, each with a peak of its own that grows with depth in its own way."""


class Question(Record, frozen=True, kw_only=True):
    """What to trace."""

    spec: ModelSpec
    settings: MemorySettings


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's mode is not typed
    """Counts every storage from its first operation until nothing refers to it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's mode is not typed
        self.held: dict[int, int] = {}
        self.now = self.peak = 0
        self.vocabulary = vocabulary

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)

    def take_peak(self) -> int:
        """Return the peak since the last call and begin anew."""
        found, self.peak = self.peak, self.now
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returns."""
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aten = torch.ops.aten
        if func is aten.embedding_dense_backward.default:  # one kernel on devices, several on meta
            return torch.empty(args[2], args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
        if func is aten.add.Tensor and self._is_vocabulary(*args[:2]):  # autograd adds in place outside modes
            return args[0].add_(args[1])
        if func in (aten.add.Tensor, aten.mul.Tensor) and self._alike(*args[:2]):
            return torch.empty_like(args[0])  # what the meta kernel gives, after a long way through Python
        return func(*args, **kwargs)

    @staticmethod
    def _alike(one: Any, other: Any) -> bool:
        return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype

    def _is_vocabulary(self, one: Any, other: Any) -> bool:
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.dim() == 2
            and one.shape[0] == self.vocabulary
            and one.shape == other.shape
        )


def trace(spec: ModelSpec, settings: MemorySettings) -> TracedPeaks:
    """Follow every tensor of two steps.

    Raises:
        RefusedError: the tuner or the objective is not one that is traced.
    """
    if settings.tuner not in TUNERS or settings.objective not in OBJECTIVES:
        raise RefusedError(
            f"{settings.objective} with {settings.tuner} is not traced; valid: {', '.join(OBJECTIVES)} with "
            f"{', '.join(TUNERS)}.",
            "Use --engine closed_form.",
        )
    prepare(settings)
    if spec.shape.layers <= WHOLE_BLOCKS:
        return _peaks(moments(spec, settings))
    return extrapolate(spec, settings)


def extrapolate(spec: ModelSpec, settings: MemorySettings) -> TracedPeaks:
    """Trace smaller depths, and add for each further block what the last ones added to each moment."""
    found: dict[int, dict[str, int]] = {}
    growth: dict[str, float] = {}
    for depth in DEPTHS:
        shape = structs.replace(spec.shape, layers=depth)
        found[depth] = moments(structs.replace(spec, shape=shape), settings)
        if len(found) < 2:
            continue
        before, growth = growth, _growth(*list(found.items())[-2:])
        if before and all(abs(growth[name] - each) <= SAME_GROWTH * each for name, each in before.items()):
            further = spec.shape.layers - depth
            ends = {name: round(size + growth[name] * further) for name, size in found[depth].items()}
            return structs.replace(_peaks(ends), traced_blocks=tuple(found))
    return _peaks(moments(spec, settings))


def _growth(one: tuple[int, dict[str, int]], other: tuple[int, dict[str, int]]) -> dict[str, float]:
    """Bytes that a block adds to each moment, from what two depths hold."""
    (few, small), (many, large) = one, other
    return {name: (large[name] - small[name]) / (many - few) for name in small}


def _peaks(found: dict[str, int]) -> TracedPeaks:
    return TracedPeaks(
        steady=found["steady"], forward=found["forward"], optimizer=found["optimizer"],
        backward=max(found[name] for name in BACKWARD if name in found),
    )  # fmt: skip


def moments(spec: ModelSpec, settings: MemorySettings) -> dict[str, int]:
    """Return the bytes held at the fullest of each moment of the second step."""
    model = build(spec, settings)
    ledger = Ledger(spec.shape.vocab)
    with ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor)
        return _steps(model, spec, settings, ledger)


def _mark(model: nn.Module, layers: int, ledger: Ledger) -> list[int]:
    """Let the gradients that leave the head, the last block and the second one end a part of the backward.

    Returns the list that the peak of each part is appended to."""
    ended: list[int] = []
    blocks = next(one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == layers)

    def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: ended.append(ledger.take_peak()))

    for number in sorted({layers - 1, layers - 2, 0} & set(range(layers))):
        blocks[number].register_forward_hook(watch)
    return ended


def _steps(model: nn.Module, spec: ModelSpec, settings: MemorySettings, ledger: Ledger) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True) if settings.optimizer == "adamw_torch" else None
    inputs = _inputs(settings)
    states: list[Tensor] = []
    found: dict[str, int] = {}
    ended = _mark(model, spec.shape.layers, ledger)
    for step in range(2):
        if step and settings.accumulate:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        ledger.take_peak()
        found = {"steady": ledger.now}
        with Autocast(torch.bfloat16) if mixed(settings) else contextlib.nullcontext():
            held = _loss(model, inputs, inputs["input_ids"], settings)
        found["forward"] = ledger.take_peak()
        ended.clear()
        torch.autograd.backward(held[:1])
        held = ()
        found |= zip(BACKWARD, [*ended, ledger.take_peak()], strict=False)
        states += _update(trained, optimizer, settings, first=step == 0)
        found["optimizer"] = ledger.take_peak()
    return found


def _inputs(settings: MemorySettings) -> dict[str, Any]:
    """What the model is called with."""
    ids = torch.zeros(sequences(settings), settings.seq_len, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if settings.tuner != "prefix_tuning":
        inputs["use_cache"] = False
    if in_tiles(settings):
        inputs |= {"fused_lm_head": True, "labels": ids}
    return inputs


def _loss(model: nn.Module, inputs: dict[str, Any], ids: Tensor, settings: MemorySettings) -> tuple[Any, ...]:
    """Return the loss of an objective, then what its trainer still holds during the backward pass."""
    if settings.objective in ("sft", "cpt"):
        outputs = model(**{**inputs, "labels": ids})
        # The trainer has let go of the outputs of the tiled head; a plain loop keeps its logits.
        return (outputs.loss,) if in_tiles(settings) else (outputs.loss, outputs)
    outputs = model(**inputs)
    if settings.objective == "reward":
        better, worse = outputs.logits.squeeze(-1).chunk(2)
        return -functional.logsigmoid(better - worse).mean(), outputs
    if in_tiles(settings):
        sums = outputs.log_probs.sum(1)
    else:
        logits = outputs.logits[:, :-1]
        del outputs  # as our own pair loss: it refers to the logits alone, and to no narrow copy of them
        picked = functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        sums = -picked.view(ids.shape[0], -1).sum(1)
    if settings.objective == "kto":
        return (-torch.sigmoid(sums).mean(),)
    better, worse = sums.chunk(2)
    return (-functional.logsigmoid(better - worse).mean(),)


def _update(
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    settings: MemorySettings,
    *,
    first: bool,
) -> Iterator[Tensor]:
    """One optimizer step; those that the meta device cannot run leave only their states behind."""
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
        return iter(())
    for parameter in trained:
        parameter.grad = None
    if not first or "paged" in settings.optimizer:
        return iter(())
    dtype = torch.uint8 if "8bit" in settings.optimizer else None
    return iter([torch.zeros_like(p, dtype=dtype) for p in trained for _ in range(2)])


def main() -> NoReturn:
    """Answer the questions of standard input, line by line."""
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=Question)
        sys.stdout.buffer.write(msgspec.json.encode(trace(question.spec, question.settings)) + b"\n")
        sys.stdout.buffer.flush()
    sys.exit(0)


if __name__ == "__main__":
    main()
