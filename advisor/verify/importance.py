"""Measures what the trained model multiplies its matrices by, on the person's own texts.

Goes in: a trained model, files of rows. Comes out: `Importance` for the quantiser. Never does: read the
rows that a proof reads first, where there are enough others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from advisor.errors import InputError
from advisor.export.importance import Importance
from advisor.export.source import find_trained
from advisor.gguf_rules import rules
from advisor.probe.load import free_cores
from advisor.verify.reference import load_trained, render, token_ids
from advisor.verify.samples import read_conversations


def measure_importance(
    source: Path, rows: Sequence[Path], *, offline: bool, on_progress: Callable[[str], None]
) -> Importance:
    """Let the trained model read texts and note the mean square of each input column of each matrix.

    Args:
        source: Run folder, adapter folder or Hugging Face folder.
        rows: Files of rows or text. Of more than a few rows the first half is left to the proof.
        offline: Never ask the hub for the base model.
        on_progress: Told in a few words what is being done.

    Raises:
        InputError: the rows hold too few tokens.
        ModelError: the trained model cannot be loaded.
        RefusedError: there is not enough memory to load it.
    """
    facts = rules().importance
    read = list(read_conversations(rows, most=facts.most_rows))
    kept = read[len(read) // 2 :]
    torch.set_num_threads(min(torch.get_num_threads(), free_cores()))
    tokenizer, model = load_trained(find_trained(source, offline=offline, on_progress=on_progress))
    on_progress("measuring the importance of columns")
    texts = [
        token_ids(tokenizer, (row if isinstance(row, str) else render(tokenizer, row)) or "") for row in kept
    ]
    texts = [ids[: facts.row_tokens] for ids in texts if len(ids) > 1]
    tokens = sum(map(len, texts))
    if tokens < facts.least_tokens:
        raise InputError(
            f"The second half of {', '.join(map(str, rows)) or 'no file'} has {tokens} tokens; "
            f"at least {facts.least_tokens} are needed.",
            "Name a file with more rows: --imatrix FILE",
        )
    return Importance(
        columns=_mean_squares(model, texts), rows=len(texts), tokens=tokens,
        source=", ".join(path.name for path in rows),
    )  # fmt: skip


def _mean_squares(model: Any, texts: list[list[int]]) -> dict[str, Any]:
    """Return parameter -> mean square of each input column, (columns,)."""
    virtual = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if isinstance(model, PeftModel) and not virtual:
        model = model.merge_and_unload(safe_merge=True)
    base = model.get_base_model() if virtual else model
    sums, counts = dict[str, torch.Tensor](), dict[str, int]()

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def note(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            flat = given[0].detach().flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(())) + flat.double().square().sum(0).cpu()
            counts[name] = counts.get(name, 0) + len(flat)

        return note

    head = base.get_output_embeddings()
    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    try:
        with torch.inference_mode():
            for ids in texts:
                model(torch.tensor([ids], device=base.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).numpy().astype(np.float32) for name, total in sums.items()}
