"""Writes the trained adapter as a folder of its own, to load with peft or to hand on.

Goes in: the adapter as training saved it. Comes out: a folder with weights, tokenizer and model card. Never
does: change a weight; take numbers along that are none; name a folder of this machine in the card.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from advisor.export.checkpoint import open_checkpoint, read_json
from advisor.export.encode import Type, encode_rows
from advisor.export.files import complete_folder, need_only
from advisor.export.merged_folder import TOKENIZER_FILES
from advisor.export.source import Trained
from advisor.storage import file_sha256
from advisor.types import ExportedFile

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CARD_FILE, _TAGS = "README.md", "tags: [peft, ftadvisor]"
_CARD = """---
{front}library_name: peft
pipeline_tag: text-generation
{tags}
---

# {name}

An adapter of {base}{revision}: {kind}. It answers only together with that model.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Or, offline: `ftadvisor chat {name}`.
"""


def folder_bytes(adapter: Path) -> int:
    """Return the bytes of the weights."""
    return (adapter / _WEIGHTS).stat().st_size


def write_adapter(folder: Path, trained: Trained, adapter: Path) -> list[ExportedFile]:
    """Write the folder, complete or not at all, and return its weights file.

    Raises:
        DiskError: the disk is full, or the folder holds what no export wrote.
        ExportError: a weight is not finite.
    """
    card = folder / _CARD_FILE
    ours = not card.is_file() or _TAGS in card.read_text(encoding="utf-8", errors="replace")
    need_only(folder, (_WEIGHTS, _CONFIG, *TOKENIZER_FILES, *([_CARD_FILE] if ours else [])))
    stored = open_checkpoint(adapter, stem="adapter_model")
    for name in stored.tensors:
        encode_rows(name, stored.rows(name, slice(None)), Type.F32)
    with complete_folder(folder) as aside:
        for name in (_WEIGHTS, _CONFIG):
            shutil.copyfile(adapter / name, aside / name)
        for name in TOKENIZER_FILES:
            if (Path(trained.tokenizer) / name).is_file():
                shutil.copyfile(Path(trained.tokenizer) / name, aside / name)
        (aside / _CARD_FILE).write_text(_card(folder.name, read_json(adapter / _CONFIG)), encoding="utf-8")
    path = folder / _WEIGHTS
    return [
        ExportedFile(
            path=str(path), kind="adapter", quant=None, bytes=path.stat().st_size, sha256=file_sha256(path)
        )
    ]


def _card(name: str, config: dict[str, Any]) -> str:
    named = str(config["base_model_name_or_path"])
    public = named.count("/") == 1 and not named.startswith(("/", "."))
    rank = f", rank {config['r']}" if config["peft_type"] == "LORA" else ""
    return _CARD.format(
        front=f"base_model: {named}\n" if public else "",
        tags=_TAGS,
        name=name,
        base=named if public else f"{Path(named).name}, a model folder",
        revision=f" at revision {config['revision']}" if public and config.get("revision") else "",
        kind=f"{config['peft_type']}{rank}",
    )
