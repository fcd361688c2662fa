"""Bottleneck adapters: small layers of our own between the frozen ones, since PEFT has none.

Goes in: a decoder model. Comes out: the same model with one named adapter in every block, kept as two files
(configuration and weights) that are loaded, swapped and switched off at run time. Never does: change or copy
a weight of the base; rename its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from advisor.errors import InputError, ModelError, UnknownNameError
from advisor.storage import read_record, write_json
from advisor.types import Record

Style = Literal["houlsby", "pfeiffer"]
PLACES: dict[str, tuple[str, ...]] = {"houlsby": ("attention", "feedforward"), "pfeiffer": ("feedforward",)}
"""Behind which sublayers of a block an adapter stands; both add before the residual does."""
LAST_LINEAR = {
    "attention": ("self_attn.o_proj", "attn.c_proj"), "feedforward": ("mlp.down_proj", "mlp.c_proj"),
}  # fmt: skip
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KIND = "BOTTLENECK"


class BottleneckConfig(Record, frozen=True, kw_only=True):
    """What adapter_config.json says of a bottleneck adapter; `peft_type` tells it from PEFT's own."""

    peft_type: Literal["BOTTLENECK"] = "BOTTLENECK"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    style: Style
    bottleneck: int


class Bottleneck(nn.Module):
    """Down, non-linearity, up, added to what passes; starts as the identity."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` (batch, tokens, width) with the adapter's change, in the same number format."""
        inner = nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype)))
        change: torch.Tensor = self.up(inner)
        return hidden + change.to(hidden.dtype)


class Slot(nn.Module):
    """The adapters behind one sublayer, by name; the chosen one is used, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ModuleDict()
        self.chosen: str | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the chosen adapter."""
        return hidden if self.chosen is None else self.named[self.chosen](hidden)


class _Behind:
    """The forward hook: finds the slot through the module itself, so that a copied model uses its own."""

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        slot = module.get_submodule("adapters")
        return slot(output)  # type: ignore[no-any-return]  # nn.Module calls are not typed


def add(model: nn.Module, config: BottleneckConfig, *, name: str = "default") -> None:
    """Add a new adapter to every block and choose it; the base is frozen.

    Raises:
        ModelError: the blocks of this architecture are not known.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    for linear in _places(model, config.style):
        if "adapters" not in dict(linear.named_children()):
            linear.add_module("adapters", Slot())
            linear.register_forward_hook(_Behind())
        slot = linear.get_submodule("adapters")
        assert isinstance(slot, Slot)
        slot.named[name] = Bottleneck(_width(linear), config.bottleneck).to(linear.weight.device)  # type: ignore[arg-type]  # a Tensor
    choose(model, name)


def choose(model: nn.Module, name: str | None) -> None:
    """Use the adapter `name` from now on; None switches all off.

    Raises:
        UnknownNameError: there is no adapter of that name.
    """
    found = _slots(model)
    names = {known for slot in found for known in slot.named}
    if name is not None and name not in names:
        raise UnknownNameError("adapter", name, names)
    for slot in found:
        slot.chosen = name if name is None or name in slot.named else None


def names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters on a model."""
    return tuple(dict.fromkeys(name for slot in _slots(model) for name in slot.named))


def save(model: nn.Module, folder: Path, config: BottleneckConfig, *, name: str = "default") -> None:
    """Write one adapter as configuration and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    part = f".adapters.named.{name}."
    weights = {
        key.replace(part, ".adapters."): value.detach().to("cpu").contiguous()
        for key, value in model.state_dict().items()
        if part in key
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def load(model: nn.Module, folder: Path, *, name: str = "default") -> BottleneckConfig:
    """Put a saved adapter onto a model beside those it has, and choose it.

    Raises:
        InputError: the folder holds no bottleneck adapter.
        ModelError: it belongs to a model of another shape.
    """
    config = read_record(folder / CONFIG, BottleneckConfig)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}.", "Give the adapter folder of a finished run.")
    add(model, config, name=name)
    weights = {
        key.replace(".adapters.", f".adapters.named.{name}."): value
        for key, value in load_file(folder / WEIGHTS).items()
    }
    own = {key: value.shape for key, value in model.state_dict().items() if f".adapters.named.{name}." in key}
    if own != {key: value.shape for key, value in weights.items()}:
        raise ModelError(
            f"The adapter in {folder} does not fit this model.", "Name the base that it was trained on."
        )
    model.load_state_dict(weights, strict=False)
    return config


def shape_of(model: nn.Module, *, name: str = "default") -> BottleneckConfig:
    """Return what an adapter on a model looks like."""
    found = [module for slot in _slots(model) for key, module in slot.named.items() if key == name]
    blocks = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]  # a transformers configuration
    style: Style = "houlsby" if len(found) == 2 * blocks else "pfeiffer"
    first = found[0]
    assert isinstance(first, Bottleneck)
    return BottleneckConfig(style=style, bottleneck=first.down.out_features)


def is_saved_in(folder: Path) -> bool:
    """Tell whether a folder holds a bottleneck adapter and not one of PEFT."""
    file = folder / CONFIG
    return file.is_file() and f'"{KIND}"' in file.read_text("utf-8")


def _slots(model: nn.Module) -> list[Slot]:
    return [module for module in model.modules() if isinstance(module, Slot)]


def _places(model: nn.Module, style: str) -> list[nn.Module]:
    ends = tuple(end for place in PLACES[style] for end in LAST_LINEAR[place])
    found = [module for name, module in model.named_modules() if name.endswith(ends)]
    if not found:
        raise ModelError(
            f"It is not known where the blocks of {type(model).__name__} take bottleneck adapters.",
            "Choose lora: ftadvisor plan --method lora",
        )
    return found


def _width(linear: nn.Module) -> int:
    """Return how many values leave a linear layer; Conv1D of GPT-2 names it differently."""
    return int(linear.nf) if type(linear).__name__ == "Conv1D" else int(linear.out_features)  # type: ignore[arg-type]  # ints, held as attributes
