"""How is the starter model made from nothing?

In: a recipe file whose keys program.toml lists, and the text of corpus.py. Out: a model folder as
transformers saves it: weights in bfloat16, tokenizer, chat template, generation settings.
Never: reads the network, reads other text than corpus.py makes, or accepts a key that it does not use.

Started as `python -P recipes/starter/train.py <recipe.yaml>`.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # `python -P` leaves the script's folder out
    sys.path.append(str(HERE))
import corpus  # noqa: E402  (found by the line above)

# read when torch starts: threads that spin while they wait slow each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

END, TURN, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
BLOCK = 256
"""Weights in a block of GGUF's K-quants; a row of another width would stay unquantised."""
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe and check it against program.toml.

    Raises:
        SystemExit: a key is missing, unknown, of the wrong type, or out of its range.
    """
    keys = tomllib.loads((HERE / "program.toml").read_text("utf-8"))["keys"]
    recipe: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    given = set(recipe) if isinstance(recipe, dict) else set()
    wrong = [f"missing key {name}" for name in sorted(set(keys) - given)]
    wrong += [f"unknown key {name}" for name in sorted(given - set(keys))]
    for name in sorted(given & set(keys)):
        value, rule = recipe[name], keys[name]
        low, high = rule.get("low", value), rule.get("high", value)
        if (
            type(value) is not TYPES[rule["type"]]
            or value not in rule.get("choices", [value])
            or (rule["type"] in ("int", "float") and not low <= value <= high)
        ):
            wrong.append(f"{name} = {value!r} is not allowed by {rule}")
    if not wrong and recipe["heads"] * 64 != recipe["hidden_size"]:
        wrong.append("heads x 64 must be hidden_size")
    if not wrong and (recipe["hidden_size"] % BLOCK or recipe["intermediate_size"] % BLOCK):
        wrong.append(f"hidden_size and intermediate_size must be multiples of {BLOCK}")
    if wrong:
        raise SystemExit(f"{path}: " + "; ".join(wrong))
    return recipe


def pieces(document: list[dict[str, str]] | str, learn_from: str) -> list[tuple[str, bool]]:
    """Split a document into texts that join to the template, each with whether it counts in the loss."""
    if isinstance(document, str):
        return [(document + END, True)]
    parts = []
    for message in document:
        answer = message["role"] == "assistant"
        parts.append((f"{TURN}{message['role']}\n", learn_from == "all"))
        parts.append((message["content"] + TURN_END, answer or learn_from == "all"))
        parts.append(("\n", learn_from == "all"))
    return [*parts, (END, learn_from == "all")]


def make_tokenizer(book: corpus.Book, recipe: dict[str, Any]) -> Any:
    """Learn a byte-level BPE from the corpus and wrap it as transformers expects it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe["vocabulary_size"],
        special_tokens=[END, TURN, TURN_END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    source = corpus.documents(book, recipe["seed"], recipe["narrative_share"])
    texts = (
        document if isinstance(document, str) else "\n".join(message["content"] for message in document)
        for document in itertools.islice(source, recipe["tokenizer_documents"])
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[END, TURN],
        chat_template=TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_rows(book: corpus.Book, tokenizer: Any, recipe: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Lay documents end to end in rows of `block_tokens`; the last of a row is cut.

    Positions begin anew with each document, from which transformers sees that they must not see each other.
    """
    encode = functools.cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    source = corpus.documents(book, recipe["seed"] + 1, recipe["narrative_share"])
    length = recipe["block_tokens"]
    rows: list[dict[str, list[int]]] = []
    while len(rows) * length < recipe["tokens"]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while len(ids) < length:
            for text, learn in pieces(next(source), recipe["learn_from"]):
                ids += encode(text)
                labels += encode(text) if learn else [-100] * len(encode(text))
            positions += range(len(ids) - len(positions))
        row = {"input_ids": ids, "labels": labels, "position_ids": positions}
        rows.append({name: values[:length] for name, values in row.items()})
    return rows


def main(recipe_path: Path) -> None:
    """Train a model by the recipe and write its folder."""
    recipe = read_recipe(recipe_path)
    import torch
    import transformers

    torch.set_num_threads(recipe["threads"])
    transformers.set_seed(recipe["seed"])
    book = corpus.load()
    tokenizer = make_tokenizer(book, recipe)
    rows = make_rows(book, tokenizer, recipe)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe["hidden_size"],
            intermediate_size=recipe["intermediate_size"],
            num_hidden_layers=recipe["layers"],
            num_attention_heads=recipe["heads"],
            num_key_value_heads=recipe["kv_heads"],
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=recipe["initializer_range"],
            use_cache=False,  # a cache would hide from transformers where documents begin
            bos_token_id=None,
            **ends,
        )
    )
    counted = sum(label != -100 for row in rows for label in row["labels"])
    print(f"{model.num_parameters():,} parameters, {counted:,} tokens count in the loss", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=recipe["batch_rows"],
            learning_rate=recipe["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=int(recipe["warmup_share"] * len(rows) / recipe["batch_rows"]),
            weight_decay=recipe["weight_decay"],
            adam_beta2=recipe["adam_beta2"],
            bf16=recipe["bf16"],
            use_cpu=True,
            seed=recipe["seed"],
            logging_steps=recipe["log_every"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model, arguments, transformers.default_data_collator, rows).train()
    model.config.use_cache = True
    model.generation_config.update(**ends, do_sample=False, max_new_tokens=128, use_cache=True)
    model.to(torch.bfloat16).save_pretrained(recipe["output_dir"])
    tokenizer.save_pretrained(recipe["output_dir"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python -P recipes/starter/train.py <recipe.yaml>")
    main(Path(sys.argv[1]))
