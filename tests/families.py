"""Builds tiny random models of further families with transformers, and SentencePiece-style BPE.

Goes in: a folder and the family. Comes out: the folder. Every weight is random, norms and biases too, and the
embeddings are small where a family multiplies them, so that the blocks decide the answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from tiny import CHATML, END_OF_TURN, PAD, SPECIAL_TOKENS, TRAINING_LINES, _write_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
USUAL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GEMMA = {"head_dim": 64}
WINDOW = {"query_pre_attn_scalar": 64, "sliding_window": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", USUAL),
    "mistral": ("MistralConfig", USUAL | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", USUAL),
    "qwen3": ("Qwen3Config", USUAL | {"head_dim": 64}),
    "gemma": ("GemmaConfig", USUAL | GEMMA),
    "gemma2": ("Gemma2Config", USUAL | GEMMA | WINDOW),
    "gemma3": ("Gemma3TextConfig", USUAL | GEMMA | WINDOW | {"num_hidden_layers": 6}),
    "phi3": ("Phi3Config", USUAL | {"original_max_position_embeddings": 256}),
    "smollm3": ("SmolLM3Config", USUAL | {"num_hidden_layers": 4}),
    "granite": (
        "GraniteConfig",
        USUAL | {
            "attention_multiplier": 0.03, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
            "logits_scaling": 4.0,
        },
    ),
    "olmo2": ("Olmo2Config", USUAL),
    "gpt2": ("GPT2Config", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}  # fmt: skip
LONGROPE = {
    "max_position_embeddings": 512, "partial_rotary_factor": 0.75,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
        "short_factor": [1.0 + 0.02 * i for i in range(24)],
        "long_factor": [1.0 + 0.5 * i for i in range(24)],
    },
}  # fmt: skip


def make_family(
    folder: Path, family: str, *, tied: bool = True, spm: bool = False, config: dict[str, Any] | None = None
) -> Path:
    """Write a random model of a family.

    Args:
        folder: Created if missing.
        family: A key of `FAMILIES`.
        tied: Whether the output layer shares the embedding.
        spm: SentencePiece-style BPE instead of byte-level.
        config: Entries that replace those of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = 640 if spm else 512
    ids = (
        write_pieces(folder, vocab=vocab, prefix=not family.startswith("gemma"))
        if spm
        else _write_tokenizer(
            folder, kind="qwen2-nfc" if family.startswith("qwen") else "gpt2", vocab=vocab, chat_template=True
        )
    )
    name, settings = FAMILIES[family]
    made = getattr(transformers, name)(
        vocab_size=vocab, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=ids[END_OF_TURN],
        pad_token_id=ids[PAD], **(settings | (config or {})),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        randomise(model, small=family.startswith("gemma") or family == "granite")
    if tied:
        model.tie_weights()
    model.save_pretrained(folder)
    return folder


def randomise(model: Any, *, small: bool) -> None:
    """Give every parameter values that would be missed."""
    from_zero = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape)
            if value.ndim == 1:
                middle = 0.0 if name.endswith("bias") or from_zero else 1.0
                final = 7.0 if small and name.split(".")[-2] == "norm" else 0.0
                value.copy_(middle + final + 0.1 * noise)
            elif any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
                value.copy_((0.02 if small else 0.12) * noise)
            else:
                inputs = value.shape[0] if type(model).__name__.startswith("GPT2") else value.shape[1]
                value.copy_(inputs**-0.5 * noise)


def write_pieces(folder: Path, *, vocab: int, prefix: bool, added: bool = False) -> dict[str, int]:
    """Write a SentencePiece-style BPE: byte fallback, all ways to merge each piece, tokenizer.json alone."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=vocab - 300, show_progress=False)
    trained.train_from_iterator([SPACE + line for line in TRAINING_LINES * 3], trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    first = ["<unk>", "<s>", "</s>", *([] if added else SPECIAL_TOKENS)]
    tokens = [*first, *(f"<0x{value:02X}>" for value in range(256)), *pieces]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<unk>", "<s>", "</s>", *SPECIAL_TOKENS)
        ]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END_OF_TURN,
        "unk_token": "<unk>", "pad_token": PAD, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return {token: made.token_to_id(token) for token in SPECIAL_TOKENS}
