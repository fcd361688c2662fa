"""Does an importance matrix from one's own held-out rows bring a quantised file nearer to the trained model?

`python benchmarks/importance.py RUN_DIR [--rows FILE]`: a finished run; FILE in place of its held-out rows to
measure importance on. Prints a table in Markdown; keep it under benchmarks/results/. Importance is
measured on the second half of the rows, divergence on the first half of the held-out ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
QUANTS = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")


def divergences(file: Path, reference: list[np.ndarray], sequences: list[list[int]]) -> np.ndarray:
    """Return the mean divergence from the trained model for each text, in nats."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(file), logits_all=True, flash_attn=False, n_ctx=512, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    found = []
    for want, ids in zip(reference, sequences, strict=True):
        model.reset()
        model.eval(ids)
        log_have = _log_softmax(np.array(model.scores[: len(ids)], dtype=np.float64))
        log_want = _log_softmax(want.astype(np.float64))
        found.append(float((np.exp(log_want) * (log_want - log_have)).sum(-1).mean()))
    model.close()
    return np.array(found)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    values = values - values.max(-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(-1, keepdims=True)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=Path)
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    import torch

    from advisor.export import export_model
    from advisor.export.source import find_trained
    from advisor.verify import heldout_rows
    from advisor.verify.importance import measure_importance
    from advisor.verify.reference import load_trained, render, token_ids
    from advisor.verify.samples import read_conversations

    heldout = heldout_rows(given.run)
    found = measure_importance(
        given.run, (given.rows,) if given.rows else heldout, offline=True, on_progress=lambda _: None
    )
    tokenizer, model = load_trained(find_trained(given.run, offline=True, on_progress=lambda _: None))
    rows = list(read_conversations(heldout, most=512))
    texts = [row if isinstance(row, str) else render(tokenizer, row) or "" for row in rows[: len(rows) // 2]]
    sequences = [token_ids(tokenizer, text)[:512] for text in texts]
    with torch.inference_mode():
        logits = [model(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    print(f"# Importance matrix, {time.strftime('%Y-%m-%d')}\n")
    print(f"Importance from {found.rows} rows ({found.tokens} tokens) of {found.source}; divergence on "
          f"{len(sequences)} other held-out rows ({sum(map(len, sequences))} tokens).\n")  # fmt: skip
    print("| quantisation | bits | KL without | KL with | change | nearer rows |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        without = export_model(given.run, quants=QUANTS, out=Path(place, "without")).files
        having = export_model(given.run, quants=QUANTS, out=Path(place, "with"), importance=found).files
        for plain, weighted in zip(without, having, strict=True):
            before, after = (divergences(Path(f.path), logits, sequences) for f in (plain, weighted))
            nearer = f"{int((after < before).sum())} of {len(before)}"
            means = f"{before.mean():.5f} | {after.mean():.5f} | {after.mean() / before.mean() - 1:+.0%}"
            print(f"| {plain.quant} | {weighted.bits_per_weight:.2f} | {means} | {nearer} |", flush=True)


if __name__ == "__main__":
    main()
