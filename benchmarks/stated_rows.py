"""What does a measured row say of itself? For programs that benchmarks/data/assumptions.toml does not know.

Goes in: a row of a CSV, with the columns of benchmarks/data/measured_memory.csv or other common names for
them. Comes out: the same row under the usual names, and MemorySettings as fields. Never does: know a source;
guess in silence: what a row leaves open is named in `unknown` and widens the band.
"""

from __future__ import annotations

import re
from typing import Any

from advisor.estimate.tunable import TUNERS, tuner_name
from advisor.knowledge import Knowledge
from advisor.units import GIB

Row = dict[str, str]
NAMES = {
    "reference": ("source_ref", "url"), "framework": ("program", "library", "trainer"),
    "model": ("model_id", "model_name"), "method": ("tuner", "peft", "finetuning_type"),
    "base_dtype": ("dtype", "precision", "compute_dtype"), "quant": ("quantization", "quantisation"),
    "lora_r": ("lora_rank", "rank", "r"), "lora_targets": ("target_modules", "targets", "target"),
    "trainable_params": ("trainable_parameters",),
    "micro_batch": ("batch_size", "per_device_train_batch_size", "micro_batch_size"),
    "seq_len": ("sequence_length", "max_seq_len", "max_seq_length", "seq_length", "max_length", "cutoff_len"),
    "grad_ckpt": ("gradient_checkpointing", "activation_checkpointing"), "optimizer": ("optim",),
    "attn_impl": ("attention", "attn_implementation"), "loss_impl": ("loss",),
    "n_gpu": ("gpus", "num_gpus", "world_size"), "sharding_offload": ("sharding", "shard", "parallel"),
    "peak_gib": ("peak_memory_gib", "max_memory_gib"), "peak_value": ("peak_gb", "peak_memory_gb"),
    "peak_metric": ("metric",), "grad_accum": ("gradient_accumulation_steps",),
}  # fmt: skip
"""Column -> other names that people give it."""
COLUMNS = (*NAMES, "id", "source", "packing", "peak_unit", "gpu", "outcome", "completeness")
YES, NO = ("yes", "true", "on", "1", "unsloth", "full", "selective"), ("no", "false", "off", "0")
PLAIN_LOOPS = ("torchtune", "litgpt", "lit-gpt")
"""Programs that train in 16 bits throughout, without autocast; others hold adapters in 32 bits."""
TILED = ("chunk", "cut", "cce", "liger", "fused", "linear")
OPTIMIZERS = (
    (("paged", "8"), "paged_adamw_8bit"), (("paged",), "paged_adamw_32bit"), (("lion", "8"), "lion_8bit"),
    (("lion",), "lion_32bit"), (("adafactor",), "adafactor"), (("sgd",), "sgd"), (("8bit",), "adamw_8bit"),
    (("8-bit",), "adamw_8bit"), (("fused",), "adamw_torch_fused"), (("adam",), "adamw_torch"),
)  # fmt: skip


def usual(row: Row, number: int) -> Row:
    """Return the row with every usual column, empty where it has none; a figure in GB becomes GiB."""
    lower = {name.strip().lower(): (value or "").strip() for name, value in row.items() if name}
    found = {
        name: next((lower[one] for one in (name, *NAMES.get(name, ())) if lower.get(one)), "")
        for name in COLUMNS
    }
    found["id"] = found["id"] or f"row {number}"
    value, unit = found["peak_value"], found["peak_unit"].lower()
    if re.fullmatch(r"\d+(\.\d+)?", value) and not found["peak_gib"]:
        gib = float(value) if "gib" in unit else float(value) * (2**20 if "mib" in unit else 1e9) / GIB
        found["peak_gib"] = str(gib)
    said = value if value.lower() in ("fits", "oom") else "measured" if found["peak_gib"] else ""
    found["outcome"] = found["outcome"] or said
    return found


def settings_of(row: Row, knowledge: Knowledge) -> dict[str, Any]:
    """Return MemorySettings as fields, by what the row says alone.

    Raises:
        ValueError: it does not say the method, the batch or the length.
    """
    missing = [name for name in ("method", "micro_batch", "seq_len") if not row[name]]
    if missing:
        raise ValueError(f"the row does not say: {', '.join(missing)}")
    unknown: list[str] = []
    program, method = row["framework"].lower(), re.split(r"[\s+_/-]+", row["method"].lower())
    plain = any(one in program for one in PLAIN_LOOPS) or "true" in row["base_dtype"]
    given: dict[str, Any] = {
        "tuner": _tuner(row["method"], method, knowledge),
        "objective": next((one for one in method if one in knowledge.objectives), "sft"),
        "micro_batch": _whole(row["micro_batch"]), "seq_len": _whole(row["seq_len"]),
        **_widths(row, plain=plain, unknown=unknown), **_optimizer(row, unknown),
        "gradient_checkpointing": _switch(row["grad_ckpt"], "checkpointing", unknown, otherwise=False),
        "checkpoint_every": 1, "packed": row["packing"].lower().startswith(YES),
        "attention": next((one for one in ("flash", "eager") if one in row["attn_impl"].lower()), "sdpa"),
        "loss": _loss(row, program, unknown), "autocast": not plain, "adapter_bits": 16 if plain else 32,
        "accumulate": row["grad_accum"] != "1", **_devices(row),
    }  # fmt: skip
    if given["tuner"] != "full":
        given |= {"lora_r": _whole(row["lora_r"]) if row["lora_r"] else 16, "target": _target(row, unknown)}
        if not row["lora_r"]:
            unknown.append("the rank is not stated: 16 counted")
    return {**given, "unknown": tuple(unknown)}


def metric_of(row: Row) -> str:
    """Return what was measured: allocated, reserved, or all that the device lost."""
    text = row["peak_metric"].lower()
    if "alloc" in text or "active" in text:
        return "allocated"
    return "reserved" if "reserved" in text or "cached" in text else "device"


def _whole(text: str) -> int:
    found = re.search(r"\d+", text.replace(",", ""))
    if found is None or not int(found[0]):
        raise ValueError(f"{text!r} is no number of rows, tokens or devices")
    return int(found[0])


def _tuner(whole: str, words: list[str], knowledge: Knowledge) -> str:
    """The tuner among the words of a method; a lone objective trains everything."""
    stated, names = knowledge.rules["tuners"], [whole.lower(), *words]
    for name in names:
        if tuner_name(name) in TUNERS or name.replace("_", "-") in stated:
            return tuner_name(name)
    if any(word in ("full", "fft", "finetune") or word in knowledge.objectives for word in words):
        return "full"
    raise ValueError(f"the method {whole} is not known")


def _widths(row: Row, *, plain: bool, unknown: list[str]) -> dict[str, Any]:
    """Precision, and bits of a stored weight."""
    text, quant, method = row["base_dtype"].lower(), row["quant"].lower(), row["method"].lower()
    half = "fp16" if re.search(r"fp16|float16|half", text) and "bfloat16" not in text else "bf16"
    wide = re.search(r"fp32|float32|^32", text) is not None
    mixed = wide and re.search(r"bf16|fp16|bfloat16|mixed|amp", text) is not None
    if not text and "qlora" not in method:
        unknown.append("the width of weights is not stated: 16 bits counted")
    found: dict[str, Any] = {
        "precision": "fp32" if wide and not mixed else half, "weight_bits": 32 if wide else 16,
    }  # fmt: skip
    if re.search(r"nf4|fp4|int4|4.?bit", quant) or (
        "qlora" in method and not re.search(r"int8|8.?bit", quant)
    ):
        found |= {"weight_bits": 4, "double_quant": not quant or "dq" in quant or "double" in quant}
    elif re.search(r"int8|8.?bit", quant):
        found["weight_bits"] = 8
    return found


def _optimizer(row: Row, unknown: list[str]) -> dict[str, Any]:
    text = row["optimizer"].lower()
    if not text:
        unknown.append("the optimizer is not stated: AdamW counted")
    name = next((name for words, name in OPTIMIZERS if all(word in text for word in words)), text)
    return {"optimizer": name or "adamw_torch", "optimizer_in_backward": "bwd" in text or "backward" in text}


def _switch(text: str, what: str, unknown: list[str], *, otherwise: bool) -> bool:
    if text.lower().startswith(YES):
        return True
    if not text.lower().startswith(NO):
        unknown.append(f"{what} is not stated: {'with' if otherwise else 'without'} it counted")
        return otherwise
    return False


def _loss(row: Row, program: str, unknown: list[str]) -> str:
    text = row["loss_impl"].lower()
    if not text and "unsloth" not in program:
        unknown.append("the loss is not stated: all logits counted")
    return (
        "chunked"
        if any(one in text for one in TILED) or (not text and "unsloth" in program)
        else "full_logits"
    )


def _devices(row: Row) -> dict[str, Any]:
    count, text = _whole(row["n_gpu"]) if row["n_gpu"] else 1, row["sharding_offload"].lower()
    shard = "fsdp" if "fsdp" in text else "zero3" if re.search(r"zero.?(stage)?.?3", text) else "none"
    return {
        "gpus": count,
        "shard": shard if count > 1 else "none",
        "offload": count > 1 and "offload" in text,
    }


def _target(row: Row, unknown: list[str]) -> str:
    text = re.sub(r"[\[\]()'\"]", " ", row["lora_targets"].lower())
    names = re.findall(r"[a-z_.\-0-9]+", text)
    if not names:
        unknown.append("the adapted layers are not stated: all counted")
    if not names or "all" in text:
        return "all-linear"
    if set(names) <= {"q", "v", "query", "value"}:
        return "q_v"
    return ",".join(names)
