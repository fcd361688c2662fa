"""How much memory would two training steps hold, by the libraries that are installed here?

    python -P -m advisor.train.trace < questions.jsonl

Goes in: JSON lines, each with `spec` (ModelSpec) and `settings` (MemorySettings). Comes out: a JSON line for
each, with the bytes held at the peak of `forward`, `backward` and `optimizer` of the second step, and
`steady` before it. Never does: allocate (the model lies on the meta device), read weights, use a GPU or the
network.

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
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advisor.errors import RefusedError
from advisor.train.trace_model import build, in_tiles, mixed, sequences
from advisor.train.trace_standins import Autocast, prepare
from advisor.types import MemorySettings, ModelSpec, Record

TUNERS = (
    "full", "lora", "qlora", "dora", "osf", "ia3", "ln_tuning", "prompt_tuning", "p_tuning",
    "prefix_tuning",
)  # fmt: skip
OBJECTIVES = ("sft", "cpt", "dpo", "kto", "orpo", "simpo", "reward")


class Question(Record, frozen=True, kw_only=True):
    """What to trace."""

    spec: ModelSpec
    settings: MemorySettings


class Peaks(Record, frozen=True, kw_only=True):
    """Bytes of live tensors in the second step."""

    steady: int
    forward: int
    backward: int
    optimizer: int


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
        return func(*args, **kwargs)

    def _is_vocabulary(self, one: Any, other: Any) -> bool:
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.dim() == 2
            and one.shape[0] == self.vocabulary
            and one.shape == other.shape
        )


def trace(spec: ModelSpec, settings: MemorySettings) -> Peaks:
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
    model = build(spec, settings)
    ledger = Ledger(spec.shape.vocab)
    with ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor)
        return _steps(model, spec, settings, ledger)


def _steps(model: nn.Module, spec: ModelSpec, settings: MemorySettings, ledger: Ledger) -> Peaks:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True) if settings.optimizer == "adamw_torch" else None
    ids = torch.zeros(sequences(settings), settings.seq_len, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if settings.tuner != "prefix_tuning":
        inputs["use_cache"] = False
    if in_tiles(settings):
        inputs |= {"fused_lm_head": True, "labels": ids}
    states: list[Tensor] = []
    peaks = Peaks(steady=0, forward=0, backward=0, optimizer=0)
    for step in range(2):
        if step and settings.accumulate:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        ledger.take_peak()
        steady = ledger.now
        with Autocast(torch.bfloat16) if mixed(settings) else contextlib.nullcontext():
            held = _loss(model, inputs, ids, settings)
        forward = ledger.take_peak()
        torch.autograd.backward(held[:1])
        held = ()
        backward = ledger.take_peak()
        states += _update(trained, optimizer, settings, first=step == 0)
        peaks = Peaks(steady=steady, forward=forward, backward=backward, optimizer=ledger.take_peak())
    return peaks


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
