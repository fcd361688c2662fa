"""What must be handed to the library so that a model with trained virtual tokens generates with them?

Goes in: the model, token ids with their mask. Comes out: what generates, and its arguments. Never does:
generate.

`generate` of PEFT 0.21 leaves a trained prefix out under transformers 5.24, which renamed the cache that the
prefix is handed over in, and counts the positions of other virtual tokens wrongly, in a cache and where texts
are filled up.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PeftType


@torch.no_grad()
def generation_inputs(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, *, adapted: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Return the model to call `generate` of, and the arguments that hold the text.

    Args:
        model: With or without an adapter.
        ids: Token ids, (batch, tokens), filled up on the left.
        mask: 1 for a token of the text, 0 for what fills up; same shape.
        adapted: Whether virtual tokens are to count.

    Returns:
        The model, and its arguments; `input_ids` may be longer than `ids`.
    """
    plain = {"input_ids": ids, "attention_mask": mask}
    if not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning):
        return model, plain
    base = model.get_base_model()
    if not adapted:
        return base, plain
    prompt = model.get_prompt(batch_size=len(ids))
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        cache = prompt
    else:
        stored = base.get_input_embeddings().weight.dtype
        cache = base(inputs_embeds=prompt.to(stored), use_cache=True).cache
    # The library takes what is in the cache for the first of the ids and computes the others alone.
    before = ids.new_zeros((len(ids), cache.get_seq_length()))
    return base, {
        "input_ids": torch.cat([before, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(before), mask], dim=1),
        "cache": cache,
    }
