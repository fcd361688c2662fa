"""What would the trained model's own program answer with the weights that are in the file?

Goes in: the file, its plan, the reference. Comes out: logits. Never does: hold more than one module's weights
beside the model; change the model.

A quantisation changes the weights, which is judged tensor by tensor. All else that makes a file answer
differently (rotation, scales, norms, the order of heads) shows here without that noise, however few the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from advisor.export.architecture import ModelPlan, PlannedTensor, row_order
from advisor.export.merged import Layout
from advisor.verify.contents import Contents
from advisor.verify.reference import Floats, Reference, base_of


def own_logits(plan: ModelPlan, file: Contents, reference: Reference, layout: Layout) -> list[Floats]:
    """Return the logits of every sequence, (positions, vocabulary), computed in float32 by transformers.

    Args:
        plan: Of the model.
        file: Whose tensors are complete and of the planned shapes.
        reference: Its model lends the program, its sequences are asked.
        layout: Of the base.
    """
    base = base_of(reference.model)
    planned = {tensor.origin: tensor for tensor in plan.tensors}
    if layout.head not in planned:
        planned[layout.head] = planned[layout.embedding]
    first = len(reference.prefix)
    texts = [reference.prefix + ids for ids in reference.sequences]
    longest = max(map(len, texts))
    given = torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts])
    real = torch.tensor([[place < len(ids) for place in range(longest)] for ids in texts])
    hooks = [base.get_submodule(layout.head.rpartition(".")[0]).register_forward_pre_hook(_only(real))]
    try:
        for module in {name.rpartition(".")[0] for name in planned}:
            own = {
                origin.rpartition(".")[2]: tensor
                for origin, tensor in planned.items()
                if origin.rpartition(".")[0] == module
            }
            before, after = _swap(file, own)
            found = base.get_submodule(module)
            hooks += [found.register_forward_pre_hook(before), found.register_forward_hook(after)]
        with torch.inference_mode():
            logits = reference.model(given).logits[0].float().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    ends = np.cumsum([len(ids) for ids in texts])
    size = logits.shape[1] - first
    return [part[first:, :size] for part in np.split(logits, ends[:-1])]


def _only(real: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    """Let the output layer see the texts without what fills them up, one after the other."""

    def pick(_: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (given[0][:, -real.shape[1] :][real][None],)

    return pick


def _swap(
    file: Contents, own: dict[str, PlannedTensor]
) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, Any], None]]:
    """Return what puts the file's weights into a module before it is called, and the trained ones back."""
    kept: dict[str, torch.Tensor] = {}

    def before(module: Any, _: Any) -> None:
        for name, tensor in own.items():
            parameter = module.get_parameter(name)
            kept[name], parameter.data = parameter.data, _in_order(file, tensor)

    def after(module: Any, _: Any, __: Any) -> None:
        for name, values in kept.items():
            module.get_parameter(name).data = values
        kept.clear()

    return before, after


def _in_order(file: Contents, tensor: PlannedTensor) -> torch.Tensor:
    """Return a tensor of the file in float32, as transformers keeps it."""
    have = np.concatenate([part for _, part in file.parts(tensor.name)]).reshape(tensor.shape)
    values = np.empty_like(have, dtype=np.float32)
    values[row_order(have.shape[0], tensor.heads) if tensor.heads else slice(None)] = have
    values -= np.float32(tensor.offset)
    return torch.from_numpy(np.ascontiguousarray(values.T) if tensor.transposed else values)
