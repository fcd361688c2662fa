"""What takes the place of operations that the meta device cannot run, so that a model can be traced on it.

Goes in: nothing; `prepare` replaces functions of torch in this process. Comes out: attention kernels, NF4
products and an autocast with the memory of the real ones. Never does: compute a value.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import trl.kernels.chunked_logprob as chunked
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from advisor.types import MemorySettings

FLASH, PADDED = "traced_fused", "traced_padded"


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


class Product4(torch.autograd.Function):
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


_TILES: tuple[Any, ...] = (chunked._forward_tile, chunked._backward_tile, chunked._addmm_fp32)


def prepare(settings: MemorySettings) -> None:
    """Register the stand-ins; this process is for tracing only."""
    for name, function in ((FLASH, _fused), (PADDED, _padded)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)
    library: Any = torch
    library.is_autocast_enabled = lambda *_: Autocast.active
    library.get_autocast_dtype = lambda *_: torch.bfloat16
    tiles = _TILES
    if settings.device == "cuda":  # on devices a kernel folds each tile in place
        tiles = (lambda *_args, **_kwargs: None,) * len(_TILES)
    chunked._forward_tile, chunked._backward_tile, chunked._addmm_fp32 = tiles
