"""Builds tiny random models for tests: a Hugging Face folder with weights, tokenizer and chat template.

Goes in: a folder and the architecture. Comes out: the folder. Every weight is random, norms and biases too,
so that leaving one out shows. Never does: import torch (numpy, safetensors and tokenizers are enough).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CHATML = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{{- '\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""A ChatML template whose generation markers enclose the answer and its end of turn."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN, PAD = "<|im_end|>", "<|pad|>"

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

TRAINING_LINES = (
    "The baker opens her shop at six and sells bread, rolls and three kinds of cake.",
    "A river runs from the hills to the sea; it's slow in summer and wild in March.",
    "They'll say we've been here before, but I'm sure she'd like to see 1984 or 2001 again.",
    "Question: how many apples are left? Answer: 12 of 3,450, about 0.35 percent.",
    "def area(width, height):\n    return width * height  # square metres\n",
    "Grüße aus Köln! Où est la gare? ¿Qué hora es? Привет, мир. 你好，世界。こんにちは。 안녕하세요.",
    '{"name": "tea", "price": 4.20, "hot": true, "tags": ["green", "black"]}',
    "Tell me about the weather. The weather is fine and the wind is light today.",
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"class": "LlamaForCausalLM", "bias": False, "qk_norm": False},
    "mistral": {"class": "MistralForCausalLM", "bias": False, "qk_norm": False, "sliding_window": None},
    "qwen2": {"class": "Qwen2ForCausalLM", "bias": True, "qk_norm": False, "use_sliding_window": False},
    "qwen3": {"class": "Qwen3ForCausalLM", "bias": False, "qk_norm": True, "use_sliding_window": False},
}


def make_tiny_model(
    folder: Path,
    *,
    architecture: str = "llama",
    tied: bool = True,
    chat_template: bool = True,
    vocab: int = 512,
    hidden: int = 256,
    layers: int = 2,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: str | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a random model that transformers loads with AutoModelForCausalLM and AutoTokenizer.

    Args:
        folder: Created if missing.
        architecture: A key of `FAMILIES`.
        tied: Whether the output layer shares the embedding.
        chat_template: Whether the tokenizer carries `CHATML`.
        vocab: Rows of the embedding; the tokenizer has at most as many tokens.
        hidden: Width; heads have 64 dimensions, there are half as many key-value heads as heads.
        layers: Number of blocks.
        seed: Of the weights.
        dtype: "float32" or "bfloat16", of the stored weights.
        tokenizer: "gpt2", "llama3", "qwen2" (split patterns) or "qwen2-nfc" (composes accents first, as Qwen
            does); None takes the family's.
        config: Entries that replace those of config.json.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = tokenizer or {"qwen2": "qwen2-nfc", "qwen3": "qwen2-nfc"}.get(architecture, "gpt2")
    ids = _write_tokenizer(folder, kind=kind, vocab=vocab, chat_template=chat_template)
    settings = _config(
        architecture, tied=tied, vocab=vocab, hidden=hidden, layers=layers, ids=ids, dtype=dtype
    )
    settings |= config or {}
    _write_json(folder / "config.json", settings)
    end = {"eos_token_id": ids[END_OF_TURN], "pad_token_id": ids[PAD]}
    _write_json(folder / "generation_config.json", {"do_sample": False, **end})
    _write_weights(folder / "model.safetensors", _weights(settings, seed=seed), dtype=dtype)
    return folder


def _config(
    architecture: str, *, tied: bool, vocab: int, hidden: int, layers: int, ids: dict[str, int], dtype: str
) -> dict[str, Any]:
    family = FAMILIES[architecture]
    heads = max(2, hidden // 64)
    extra = {key: value for key, value in family.items() if key not in ("class", "bias", "qk_norm")}
    return {
        "architectures": [family["class"]],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": ids[END_OF_TURN],
        "pad_token_id": ids[PAD],
        "dtype": dtype,
        **extra,
    }


def _weights(config: dict[str, Any], *, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    family = FAMILIES[config["model_type"]]
    out: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        out[f"{name}.weight"] = random.standard_normal((rows, columns)) * columns**-0.5
        if bias:
            out[f"{name}.bias"] = random.standard_normal(rows) * 0.1

    def norm(name: str, size: int) -> None:
        out[f"{name}.weight"] = 1 + 0.1 * random.standard_normal(size)

    out["model.embed_tokens.weight"] = random.standard_normal((config["vocab_size"], hidden)) * 0.12
    attention = bool(config.get("attention_bias", False))
    mlp = bool(config.get("mlp_bias", False))
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            matrix(f"{block}.self_attn.{name}_proj", rows, hidden, bias=family["bias"] or attention)
        matrix(f"{block}.self_attn.o_proj", hidden, queries, bias=attention)
        if family["qk_norm"]:
            norm(f"{block}.self_attn.q_norm", dim)
            norm(f"{block}.self_attn.k_norm", dim)
        matrix(f"{block}.mlp.gate_proj", inner, hidden, bias=mlp)
        matrix(f"{block}.mlp.up_proj", inner, hidden, bias=mlp)
        matrix(f"{block}.mlp.down_proj", hidden, inner, bias=mlp)
        norm(f"{block}.input_layernorm", hidden)
        norm(f"{block}.post_attention_layernorm", hidden)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = random.standard_normal((config["vocab_size"], hidden)) * 0.12
    return {name: value.astype(np.float32) for name, value in out.items()}


def _write_weights(path: Path, weights: dict[str, np.ndarray], *, dtype: str) -> None:
    if dtype == "float32":
        save_file(weights, path, metadata={"format": "pt"})
        return
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, offset = [], 0
    for name, value in weights.items():
        data = (value.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        entries[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": (offset, offset + len(data))}
        offset += len(data)
        chunks.append(data)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(chunks))


def _write_tokenizer(folder: Path, *, kind: str, vocab: int, chat_template: bool) -> dict[str, int]:
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        pattern = LLAMA3_SPLIT if kind == "llama3" else QWEN2_SPLIT
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "qwen2-nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TURN,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    )
    if chat_template:
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
