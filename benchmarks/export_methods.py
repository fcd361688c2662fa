"""Does every way of training become a file that answers as the live PEFT model does?

`python benchmarks/export_methods.py [--only METHOD] [--base FAMILY]`: prints a table in Markdown; keep it
under benchmarks/results/. Random adapters on tiny random models in float32; what is compared is what `verify`
compares. The LoRA-GGUF is put on the base's F32 file by llama-cpp-python and compared in the same way.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUANTS = ("F32", "F16", "Q8_0", "Q4_K_M")
BASES: dict[str, dict[str, bool]] = {"qwen2": {"tied": True}, "gpt2": {"tied": False}}
SAVED = {"qwen2": "input_layernorm", "gpt2": "ln_1"}
ENDS = {"qwen2": "embed_tokens", "gpt2": "wte"}
MANY = "the quick brown fox runs over the hill to the sea, and 12 boats of 3,450 wait there in March. " * 4


def methods(base: str) -> dict[str, Any]:
    """Return PEFT's configurations, those that name modules of the base included."""
    import peft

    from methods import METHODS

    task = {"task_type": "CAUSAL_LM"}
    return METHODS | {
        "saved norms": peft.LoraConfig(
            target_modules="all-linear", modules_to_save=[SAVED[base]], r=4, **task
        ),
        "saved head": peft.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], r=4, **task),
        "embedding": peft.LoraConfig(target_modules=[ENDS[base]], r=4, **task),
    }


def proved(adapter: Path, out: Path) -> list[str]:
    """Export and verify; return a cell for each quantisation: largest difference, KL, or why not."""
    from advisor.errors import AdvisorError
    from advisor.export import export_model
    from advisor.verify import verify_gguf

    try:
        made = export_model(adapter, quants=QUANTS, out=out)
    except AdvisorError as refused:
        return [f"refused: {refused.message}", *[""] * (len(QUANTS) - 1)]
    cells = []
    for file in made.files:
        if file.kind != "gguf":
            continue
        proof = verify_gguf(Path(file.path), against=adapter)
        logits = next(check.measured for check in proof.checks if check.name == "logits")
        failed = ", ".join(check.name for check in proof.checks if not check.passed)
        figures = f"{float(logits.get('max_delta') or 0):.2g} ({float(logits.get('kl_mean') or 0):.1g})"
        cells.append(figures + (f" FAILED {failed}" if failed else ""))
    return cells


def as_lora_file(base: Path, adapter: Path, out: Path) -> str:
    """Put the adapter's LoRA-GGUF on the base's file; return the largest difference, or why not."""
    import llama_cpp
    import numpy as np
    import peft
    import torch
    import transformers

    from advisor.errors import AdvisorError
    from advisor.export import export_model

    try:
        lora = export_model(adapter, to=("lora-gguf",), out=out).files[0].path
    except AdvisorError as refused:
        return refused.message.partition(": ")[2] or refused.message
    file = export_model(base, quants=("F32",), out=out).files[0].path
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer(MANY, add_special_tokens=False).input_ids[:96]
    live = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()
    with torch.inference_mode():
        want = live(torch.tensor([ids])).logits[0].numpy()
    model = llama_cpp.Llama(
        file, lora_path=lora, logits_all=True, flash_attn=False, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32, n_ctx=256, verbose=False,
    )  # fmt: skip
    model.eval(ids)
    difference = float(np.abs(np.array(model.scores[: len(ids)]) - want).max())
    model.close()
    return f"{difference:.2g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--base", choices=BASES)
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from families import make_family
    from methods import make_adapter

    print(f"# Methods, {time.strftime('%Y-%m-%d')}\n")
    print(
        "Largest difference of a logit from the live PEFT model (mean KL); all checks passed unless told.\n"
    )
    print("| base | method | " + " | ".join(QUANTS) + " | LoRA-GGUF on the base, F32 |")
    print("|---" * (len(QUANTS) + 3) + "|")
    with tempfile.TemporaryDirectory() as place:
        for base, more in BASES.items():
            if given.base not in (None, base):
                continue
            folder = make_family(Path(place, base), base, **more)
            for name, config in methods(base).items():
                if given.only not in (None, name):
                    continue
                adapter = make_adapter(folder, config, Path(place, f"{base}-{name}"), size=0.04)
                out = Path(place, f"{base}-{name}-out")
                low_rank = config.peft_type == "LORA"
                cells = [*proved(adapter, out), as_lora_file(folder, adapter, out) if low_rank else ""]
                print(f"| {base} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
