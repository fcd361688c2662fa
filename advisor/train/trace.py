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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import msgspec
import torch
import trl.kernels.chunked_logprob as chunked
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from advisor.errors import RefusedError
from advisor.train.tuners import GROUPS
from advisor.types import MemorySettings, ModelSpec, Record

TUNERS = ("full", "lora", "qlora", "prompt_tuning")
OBJECTIVES = ("sft", "cpt")
FLASH, PADDED = "traced_fused", "traced_padded"
BLOCK, OUTER = 64, 256
"""Weights of one NF4 scale, and scales of one scale of scales, as bitsandbytes has them."""


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


class Autocast(contextlib.AbstractContextManager[None]):
    """torch.autocast on the meta device: casts the inputs of matrix products, remembers casts of weights."""

    active = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.casts: dict[int, Tensor] = {}

    def cast(self, tensor: Any) -> Any:
        """Return a 32-bit tensor in the low precision; anything else as it is."""
        if tensor is None or tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(self.dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(self.dtype)
        return self.casts[id(tensor)]

    def __enter__(self) -> None:
        self.before = (functional.linear, torch.matmul, torch.addmm, Autocast.active)
        linear, matmul, addmm, _ = self.before
        _put(
            lambda x, w, b=None: linear(self.cast(x), self.cast(w), self.cast(b)),
            lambda a, b: matmul(self.cast(a), self.cast(b)),
            lambda b, x, w: addmm(self.cast(b), self.cast(x), self.cast(w)),
        )
        Autocast.active = True

    def __exit__(self, *_: object) -> None:
        *functions, Autocast.active = self.before
        _put(*functions)
        self.casts.clear()


def _put(linear: Any, matmul: Any, addmm: Any) -> None:
    """Set the matrix products that the model library calls by name."""
    places: Any = (functional, torch)
    places[0].linear, places[1].matmul, places[1].addmm = linear, matmul, addmm


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: query, key, value, output, log-sum-exp and the mask."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width)
        sums = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        query, key, value, *_rest = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    low = torch.bfloat16 if Autocast.active else query.dtype
    return _Attention.apply(query.to(low), key.to(low), value.to(low), None), None


def _padded(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """SDPA with a mask: it repeats keys and values, and turns the mask into numbers."""
    low = torch.bfloat16 if Autocast.active else query.dtype
    groups = module.num_key_value_groups
    batch, heads, length, width = key.shape
    if groups > 1:
        key, value = (
            x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, -1, length, width)
            for x in (key, value)
        )
    bias = torch.empty(batch, 1, query.shape[2], length, dtype=low, device=query.device)
    return _Attention.apply(query.to(low), key.to(low), value.to(low), bias), None


class _Product4(torch.autograd.Function):
    """A product with an NF4 matrix: both directions turn it into 16 bits for a moment, and keep no input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, outputs: int) -> Tensor:
        ctx.widths = (outputs, inputs.shape[-1])
        torch.empty(ctx.widths, dtype=torch.bfloat16, device=inputs.device)
        return inputs.new_empty(*inputs.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        torch.empty(ctx.widths, dtype=torch.bfloat16, device=gradients[0].device)
        return gradients[0].new_empty(*gradients[0].shape[:-1], ctx.widths[1]), None


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


def prepare(settings: MemorySettings) -> None:
    """Register the stand-ins; this process is for tracing only."""
    for name, function in ((FLASH, _fused), (PADDED, _padded)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)
    library: Any = torch
    library.is_autocast_enabled = lambda *_: Autocast.active
    library.get_autocast_dtype = lambda *_: torch.bfloat16
    if settings.device == "cuda":  # on devices a kernel folds each tile in place
        chunked._forward_tile = chunked._backward_tile = lambda *_args, **_kwargs: None
        chunked._addmm_fp32 = lambda *_: None


def build(spec: ModelSpec, settings: MemorySettings) -> nn.Module:
    """Return the model as the trainer has it, on the meta device."""
    rows = settings.micro_batch
    kernel = "eager" if settings.attention == "eager" else FLASH
    if settings.attention == "sdpa" and (settings.packed or rows > 1):
        kernel = PADDED
    wide = torch.float32 if settings.weight_bits == 32 else torch.bfloat16
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            _config(spec), dtype=wide, attn_implementation=kernel
        )
    model.train()
    if settings.loss == "chunked":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapters = _adapters(settings)
    if adapters is not None:
        with torch.device("meta"):
            model = get_peft_model(model, adapters)
    if settings.weight_bits == 4:
        _quantise(model, settings)
    if settings.adapter_bits == 16:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
    if settings.gradient_checkpointing:
        _checkpoint(model, settings, adapters is not None)
    return model


def _config(spec: ModelSpec) -> Any:
    shape = spec.shape
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if spec.model_type == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=shape.hidden, n_inner=shape.intermediate, n_layer=shape.layers, n_head=shape.heads,
            vocab_size=shape.vocab, n_positions=spec.context_tokens, tie_word_embeddings=shape.tied,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **ids,
        )  # fmt: skip
    return AutoConfig.for_model(
        spec.model_type, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, vocab_size=shape.vocab, tie_word_embeddings=shape.tied,
        attention_bias=shape.attention_bias, mlp_bias=shape.mlp_bias, **ids,
    )  # fmt: skip


def _adapters(settings: MemorySettings) -> PeftConfig | None:
    if settings.tuner == "full":
        return None
    if settings.tuner == "prompt_tuning":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens)
    named = GROUPS.get(settings.target) or tuple(name.strip() for name in settings.target.split(","))
    modules = settings.target if settings.target == "all-linear" else list(named)
    return LoraConfig(r=settings.lora_r, target_modules=modules, task_type="CAUSAL_LM")


def _quantise(model: nn.Module, settings: MemorySettings) -> None:
    """Replace the weight of every linear layer of the blocks by its packed form."""
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear or "lm_head" in name or "lora_" in name:
            continue
        entries, outputs = layer.weight.numel(), layer.out_features
        scales = entries // BLOCK
        size = entries // 2 + (scales + scales // OUTER * 4 if settings.double_quant else scales * 4)
        packed = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        replaced: Any = layer
        replaced.weight, replaced.forward = packed, _product_with(outputs)


def _product_with(outputs: int) -> Callable[[Tensor], Tensor]:
    def product(inputs: Tensor) -> Tensor:
        result: Tensor = _Product4.apply(inputs.to(torch.bfloat16), outputs)
        return result

    return product


def _checkpoint(model: Any, settings: MemorySettings, frozen: bool) -> None:  # noqa: FBT001 - private
    contexts: dict[str, Any] = {}
    if _mixed(settings):
        contexts["context_fn"] = lambda: (contextlib.nullcontext(), Autocast(torch.bfloat16))
    model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
    if frozen:
        model.enable_input_require_grads()


def _mixed(settings: MemorySettings) -> bool:
    return settings.autocast and settings.precision != "fp32"


def _steps(model: nn.Module, spec: ModelSpec, settings: MemorySettings, ledger: Ledger) -> Peaks:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True) if settings.optimizer == "adamw_torch" else None
    ids = torch.zeros(settings.micro_batch, settings.seq_len, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if settings.loss == "chunked":
        inputs["fused_lm_head"] = True
    states: list[Tensor] = []
    peaks = Peaks(steady=0, forward=0, backward=0, optimizer=0)
    for step in range(2):
        if step and settings.accumulate:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        ledger.take_peak()
        steady = ledger.now
        with Autocast(torch.bfloat16) if _mixed(settings) else contextlib.nullcontext():
            outputs = model(**inputs)
            loss = outputs.loss
        if settings.loss == "chunked":
            outputs = None  # the trainer has let go of them; a plain loop keeps its logits
        forward = ledger.take_peak()
        torch.autograd.backward([loss])
        loss = outputs = None
        backward = ledger.take_peak()
        states += _update(trained, optimizer, settings, first=step == 0)
        peaks = Peaks(steady=steady, forward=forward, backward=backward, optimizer=ledger.take_peak())
    return peaks


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
