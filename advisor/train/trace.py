"""How much memory would a training step hold, by the libraries that are installed here?

    python -P -m advisor.train.trace < questions.jsonl

Goes in: JSON lines, each with `spec` (ModelSpec) and `settings` (MemorySettings). Comes out: a JSON line for
each (TracedPeaks), with the bytes held at the peak of `forward`, `backward` and `optimizer` of a step, and
`steady` before it; the optimizer has made its states. A deep model is traced at a few smaller depths: what
a block adds does not depend on how many there are. Never does: allocate (the model lies on the meta device),
read weights, use a GPU or the network.

The model, its checkpointing, the adapters and TRL's loss are the real ones. Stand-ins take the place of what
the meta device cannot run: attention kernels, NF4 matrices, autocast, and the fused optimizer."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any

import msgspec
import torch
from msgspec import structs
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advisor.errors import RefusedError
from advisor.train.trace_model import build, in_tiles, mixed, sequences
from advisor.train.trace_standins import Autocast, prepare
from advisor.types import MemorySettings, ModelSpec, Record, TracedPeaks

TUNERS = (
    "full", "lora", "qlora", "dora", "osf", "ia3", "ln_tuning", "prompt_tuning", "p_tuning", "prefix_tuning",
)  # fmt: skip
OBJECTIVES = ("sft", "cpt", "dpo", "kto", "orpo", "simpo", "reward")


TRACED: dict[str, tuple[Any, ...]] = {
    "tuner": TUNERS, "objective": OBJECTIVES, "weight_bits": (4, 16, 32), "shard": ("none",),
    "offload": (False,), "offload_activations": (False,), "optimizer_in_backward": (False,),
    "checkpoint_every": (1,),
    "optimizer": (
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
        "paged_adamw_32bit",
    ),
}  # fmt: skip
"""Settings that the tracer follows; any other value of these would be traced as something else."""
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
    """Follow every tensor of a step.

    Raises:
        RefusedError: the model or a setting is not one that is traced.
    """
    _require_traced(spec, settings)
    prepare(settings)
    if spec.shape.layers <= WHOLE_BLOCKS:
        return _peaks(moments(spec, settings))
    return extrapolate(spec, settings)


def _require_traced(spec: ModelSpec, settings: MemorySettings) -> None:
    """Refuse what would be traced as something else."""
    wrong = [f"{name} = {value}" for name, value in _chosen(settings) if value not in TRACED[name]]
    if wrong:
        name = wrong[0].partition(" ")[0]
        valid = ", ".join(map(str, TRACED[name]))
        raise RefusedError(
            f"{', '.join(wrong)} is not traced; valid for {name}: {valid}.", "Use --engine closed_form."
        )
    if spec.shape.experts:
        raise RefusedError("A mixture of experts is not traced.", "Use --engine closed_form.")


def _chosen(settings: MemorySettings) -> list[tuple[str, Any]]:
    return [(name, getattr(settings, name)) for name in TRACED]


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
    """Return the bytes held at the fullest of each moment of a step."""
    model = build(spec, settings)
    ledger = Ledger(spec.shape.vocab)
    with ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor)
        return _step(model, spec, settings, ledger)


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


def _step(model: nn.Module, spec: ModelSpec, settings: MemorySettings, ledger: Ledger) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True) if settings.optimizer == "adamw_torch" else None
    states = _states(trained, optimizer, settings)
    inputs, ended = _inputs(settings), _mark(model, spec.shape.layers, ledger)
    for parameter in trained if settings.accumulate else ():
        parameter.grad = torch.zeros_like(parameter)
    ledger.take_peak()
    found = {"steady": ledger.now}
    with Autocast(torch.bfloat16) if mixed(settings) else contextlib.nullcontext():
        held = _loss(model, inputs, inputs["input_ids"], settings)
    found["forward"] = ledger.take_peak()
    torch.autograd.backward(held[:1])
    del held
    found |= zip(BACKWARD, [*ended, ledger.take_peak()], strict=False)
    if optimizer is not None:
        optimizer.step()
    found["optimizer"] = ledger.take_peak()
    del states
    return found


def _states(
    trained: list[nn.Parameter], optimizer: torch.optim.Optimizer | None, settings: MemorySettings
) -> list[Tensor]:
    """Let the optimizer make its states, as its first step does; those of one that the meta device cannot run
    are returned, to be held."""
    if optimizer is not None:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    if optimizer is not None or "paged" in settings.optimizer:
        return []
    dtype = torch.uint8 if "8bit" in settings.optimizer else None
    return [torch.zeros_like(parameter, dtype=dtype) for parameter in trained for _ in range(2)]


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


def main() -> None:
    """Answer the questions of standard input, line by line."""
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=Question)
        sys.stdout.buffer.write(msgspec.json.encode(trace(question.spec, question.settings)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
