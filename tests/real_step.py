"""One real training step of a model with random weights, and the bytes that its tensors hold at the peak.

Goes in: a ModelSpec, MemorySettings, a device. Comes out: bytes: on a processor by torch's profiler of
allocations, on a card by its allocator. Never does: read weights; use stand-ins: the kernels, autocast and
the optimizer are the real ones.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from advisor.train.trace_model import OUTPUTS, adapters_of, configuration, in_tiles
from advisor.types import MemorySettings, ModelSpec, Record


class Held(Record, frozen=True, kw_only=True):
    """Bytes of the second step."""

    steady: int
    """Before it: weights, optimizer states, gradients of the first half of the batch."""
    peak: int
    reserved: int = 0
    """What the allocator of a card took from the device."""
    lost: int = 0
    """What the device lost in all, its context included."""


def build(spec: ModelSpec, settings: MemorySettings, device: str) -> nn.Module:
    """Return the model as the program for SFT has it."""
    torch.manual_seed(0)
    wide = torch.float32 if settings.weight_bits == 32 else torch.bfloat16
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            configuration(spec), dtype=wide, attn_implementation="sdpa"
        )
    model.train()
    if in_tiles(settings):
        add_fused_lm_head(model, outputs=OUTPUTS["sft"])
    if settings.weight_bits == 4:
        _quantise(model, device)
    adapters = adapters_of(spec.model_type, settings)
    if adapters is not None:
        model = get_peft_model(model, adapters)
        model.to(device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapters is not None:
            model.enable_input_require_grads()
    return model  # type: ignore[no-any-return]  # the libraries are not typed


def _quantise(model: nn.Module, device: str) -> None:
    """Replace every linear layer of the blocks by bitsandbytes' NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or "lm_head" in name:
            continue
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4",
            compute_dtype=torch.bfloat16, compress_statistics=True,
        )  # fmt: skip
        packed.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed.to(device))


def measure(spec: ModelSpec, settings: MemorySettings, device: str) -> Held:
    """Train two steps and return what the second one held."""
    before = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    model = build(spec, settings, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    ids = torch.randint(0, spec.shape.vocab, (settings.micro_batch, settings.seq_len), device=device)
    mask = torch.ones_like(ids)
    if settings.micro_batch > 1:
        mask[-1, -1] = 0  # rows of one length need no mask, which real batches do
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    if in_tiles(settings):
        inputs["fused_lm_head"] = True
    _step(model, optimizer, inputs, settings, device)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    steady = _held(model, optimizer)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _step(model, optimizer, inputs, settings, device)
        torch.cuda.synchronize()
        return Held(
            steady=steady, peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(), lost=before - torch.cuda.mem_get_info()[0],
        )  # fmt: skip
    with torch.profiler.profile(profile_memory=True) as profile:
        _step(model, optimizer, inputs, settings, device)
    return Held(steady=steady, peak=steady + _most(profile))


def _step(
    model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], settings: MemorySettings,
    device: str,
) -> None:  # fmt: skip
    low = settings.autocast and settings.precision != "fp32"
    with torch.autocast(device, dtype=torch.bfloat16) if low else contextlib.nullcontext():
        outputs = model(**inputs)
        loss = outputs.loss
    if in_tiles(settings):
        outputs = None
    loss.backward()
    loss = outputs = None
    optimizer.step()
    optimizer.zero_grad()


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that lie between two steps, tied ones once."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in tensors
        if isinstance(one, torch.Tensor)
    }
    return sum(storages.values())


def _most(profile: Any) -> int:
    """Return the largest sum of what was allocated and not yet freed."""
    now = most = 0
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
