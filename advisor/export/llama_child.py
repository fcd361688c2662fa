"""Runs llama.cpp in a process of its own, because it aborts the process on some inputs.

Started by path, alone, with two arguments: a request (JSON) and the file for the answer. Goes in: what to do
(`choose`, `quantise` or `inspect`). Comes out: JSON, and arrays in an .npz beside it. Never does: import
ftadvisor.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

_ATTRIBUTES = {"control": llama_cpp.LLAMA_TOKEN_ATTR_CONTROL, "user": llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED}


_CHOICE = re.compile(
    r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*type = +(\w+), size = [^(\n]*(?:\((\w+)\))?", re.MULTILINE
)


def choose(request: dict[str, Any]) -> dict[str, Any]:
    """Return the type that llama.cpp would give each tensor, for each quantisation; writes nothing."""
    said: list[str] = []

    def hear(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        said.append(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    chosen = {}
    for quant in request["quants"]:
        said.clear()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}")
        params.dry_run = True
        if request["importance"]:
            # Which types are chosen depends on there being one, not on what is in it.
            params.imatrix = _importance({"none": np.ones(1)})
        code = llama_cpp.llama_model_quantize(request["source"].encode(), b"", ctypes.byref(params))
        if code != 0:
            raise RuntimeError("".join(said[-4:]).strip() or f"llama_model_quantize returned {code}")
        found = _CHOICE.findall("".join(said))
        chosen[quant] = {name: (after or before).upper() for name, before, after in found}
    return {"types": chosen}


def quantise(request: dict[str, Any]) -> dict[str, Any]:
    """Write a quantised copy of a file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['quant']}")
    params.nthread = request["threads"]
    if "importance" in request:
        with np.load(request["importance"]) as stored:
            params.imatrix = _importance({name: stored[name] for name in stored.files})
        params.kv_overrides = _entries(request["notes"])
    source, target = request["source"].encode(), request["target"].encode()
    code = llama_cpp.llama_model_quantize(source, target, ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")
    return {}


def _importance(columns: dict[str, Any]) -> Any:
    """Return an importance matrix as llama.cpp takes it, the last entry empty."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
    for entry, (name, values) in zip(entries, columns.items(), strict=False):
        _KEPT.append(np.ascontiguousarray(values, dtype=np.float32))
        entry.name, entry.size = name.encode(), len(values)
        entry.data = _KEPT[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


_KEPT: list[Any] = []
"""Arrays that llama.cpp reads."""


def _entries(notes: dict[str, int | str]) -> Any:
    """Return metadata as llama.cpp takes it, the last entry empty; it keeps 127 bytes of a text."""
    made = (llama_cpp.llama_model_kv_override * (len(notes) + 1))()
    for entry, (key, value) in zip(made, notes.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            text = value.encode()[:127].decode(errors="ignore")
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, text.encode()
    return made


def inspect(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenise, render, score and continue as an application on llama.cpp would."""
    _avoid_amx()
    model = llama_cpp.Llama(
        request["gguf"],
        n_ctx=request["context"],
        n_batch=request["context"],
        n_ubatch=request["context"],
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    vocab = model._model.vocab
    answer: dict[str, Any] = {
        "token_ids": [
            model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]
        ],
        "with_bos": [
            model.tokenize(text.encode(), add_bos=True, special=True) for text in request["with_bos"]
        ],
        "rendered": [_render(model, conversation) for conversation in request["conversations"]],
        "ends": [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "bos": llama_cpp.llama_vocab_bos(vocab),
        "eos": llama_cpp.llama_vocab_eos(vocab),
        "pad": llama_cpp.llama_vocab_pad(vocab),
        "n_vocab": model.n_vocab(),
    }
    for kind, bit in _ATTRIBUTES.items():
        answer[kind] = [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_get_attr(vocab, i) & bit]
    arrays = {}
    for number, ids in enumerate(request["sequences"]):
        first = _begin(model, request["prefix"])
        model.eval(ids)
        arrays[str(number)] = np.array(model.scores[first : first + len(ids)], dtype=np.float32)
    count, ends = request["greedy_tokens"], set(request["ends"])
    answer["greedy"], seconds = [], 0.0
    for ids in request["prompts"]:
        _begin(model, request["prefix"])
        model.eval(ids)
        started = time.monotonic()
        answer["greedy"].append(_greedy(model, count, ends))
        seconds += time.monotonic() - started
    evaluated = sum(len(tokens) - 1 for tokens in answer["greedy"])
    answer["tokens_per_second"] = evaluated / seconds if evaluated else 0.0
    return answer, arrays


def _avoid_amx() -> None:
    """Do without AMX, which gcc up to 12 compiles into a crash; see `avoid_amx` of advisor/running.py."""
    from llama_cpp import llama_cpp as library

    usual = library.llama_model_default_params
    if b"AMX_INT8 = 1" not in library.llama_print_system_info():
        return

    def plain() -> Any:
        params = usual()
        params.use_extra_bufts = False
        return params

    library.llama_model_default_params = plain


def _begin(model: llama_cpp.Llama, prefix: str | None) -> int:
    """Start anew, from a sequence state where there is one; return the tokens that it holds."""
    model.reset()
    if prefix is None:
        return 0
    room = model.n_ctx()
    ids, count = (llama_cpp.llama_token * room)(), ctypes.c_size_t(0)
    used = llama_cpp.llama_state_seq_load_file(
        model._ctx.ctx, prefix.encode(), 0, ids, room, ctypes.byref(count)
    )
    if not used:
        raise RuntimeError(f"error: llama.cpp does not take the sequence state {prefix}")
    model.n_tokens = count.value
    return count.value


def _render(model: llama_cpp.Llama, conversation: dict[str, Any]) -> str | None:
    """Render the embedded template, or return None where it refuses."""
    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    eos, bos = model.token_eos(), model.token_bos()
    formatter = Jinja2ChatFormatter(
        template=template,
        eos_token=model._model.token_get_text(eos) if eos != -1 else "",
        bos_token=model._model.token_get_text(bos) if bos != -1 else "",
        add_generation_prompt=conversation["generation_prompt"],
    )
    try:
        return str(formatter(messages=conversation["messages"]).prompt)
    except (ValueError, jinja2.TemplateError):
        return None


def _greedy(model: llama_cpp.Llama, count: int, ends: set[int]) -> list[int]:
    """Continue by the likeliest token each, up to one of `ends`."""
    found: list[int] = []
    while len(found) < count:
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        found.append(token)
        if token in ends or len(found) == count:
            break
        model.eval([token])
    return found


def _end_with(parent: int) -> None:
    """Have the kernel (Linux) end this process with the one that asked, also where that is killed."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def main() -> None:
    """Read the request, do it, write the answer."""
    request_file, answer_file = Path(sys.argv[1]), Path(sys.argv[2])
    request = json.loads(request_file.read_text(encoding="utf-8"))
    _end_with(request["parent"])
    if request["do"] == "choose":
        answer = choose(request)
    elif request["do"] == "quantise":
        answer = quantise(request)
    else:
        answer, arrays = inspect(request)
        np.savez(answer_file.with_suffix(".npz"), **arrays)
    answer_file.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
