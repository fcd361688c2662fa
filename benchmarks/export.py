"""What does an export cost beside the usual chain?

`python benchmarks/export.py --llama-cpp DIR --shape 0.5B`: DIR holds convert_hf_to_gguf.py, for
example of the source package of the installed llama-cpp-python; the converter also needs sentencepiece.
Prints tables in Markdown; keep them under benchmarks/results/. The chain: peft merges and saves, the official
converter writes 16 bits, llama.cpp quantises. Below each stands what of both is llama.cpp's own quantising.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Qwen2Config", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}),
    "0.5B": (
        "Qwen2Config",
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "1B": (
        "LlamaConfig",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
MAKE = """
import json, sys, torch, transformers, peft
sys.path.insert(0, sys.argv[4])
from tiny import _write_tokenizer
from pathlib import Path
base, adapter, (name, settings) = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
base.mkdir(parents=True)
ids = _write_tokenizer(base, kind="gpt2", vocab=512, chat_template=True)
settings = {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2} | settings
config = getattr(transformers, name)(bos_token_id=None, eos_token_id=ids["<|im_end|>"], **settings)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(base)
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
for key, value in model.named_parameters():
    if "lora_B" in key:
        torch.nn.init.normal_(value, std=0.01)
model.save_pretrained(adapter)
"""
MERGE = """
import sys, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
"""
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from conversion.base import TextModel
# The converter knows a tokenizer by a checksum, and no random one; the tensors are what is compared.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""
QUANTISE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
params.nthread = 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
OURS = """
import sys, time
from pathlib import Path
from advisor.export import encode, export_model
spent, quantise = [], encode._by_ggml
def timed(*given):
    started = time.thread_time()
    made = quantise(*given)
    spent.append(time.thread_time() - started)
    return made
encode._by_ggml = timed
export_model(Path(sys.argv[1]), quants=(sys.argv[3],), out=Path(sys.argv[2]))
Path(sys.argv[4]).write_text(str(sum(spent)))
"""


def run(code: str, *arguments: str) -> dict[str, float]:
    """Run a program in a process of its own and return seconds, CPU seconds and peak bytes."""
    started = time.monotonic()
    given = [path for path in [os.environ.get("PYTHONPATH")] if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *given])}
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    said = child.stderr.read() if child.stderr else b""
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(said.decode(errors="replace")[-3000:])
    return {
        "wall": time.monotonic() - started, "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * 1024.0,
    }  # fmt: skip


def size(folder: Path) -> int:
    """Return the bytes in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def chain(base: Path, adapter: Path, work: Path, quant: str, llama_cpp: Path) -> dict[str, float]:
    """Merge, save, convert, quantise."""
    merged, target = work / "merged", work / "chain.gguf"
    quantising = 0.0
    steps = [run(MERGE, str(base), str(adapter), str(merged))]
    first = work / "first.gguf" if quant == "Q4_K_M" else target
    outtype = {"F16": "f16", "Q8_0": "q8_0", "Q4_K_M": "bf16"}[quant]
    steps.append(run(CONVERT, str(llama_cpp), str(merged), "--outfile", str(first), "--outtype", outtype))
    if quant == "Q4_K_M":
        steps.append(run(QUANTISE, str(first), str(target), quant))
        quantising = steps[-1]["cpu"]
    total = {key: sum(step[key] for step in steps) for key in ("wall", "cpu")}
    peak = max(step["peak"] for step in steps)
    return total | {"peak": peak, "written": float(size(work)), "quantising": quantising}


def compare(shape: str, llama_cpp: Path, work: Path) -> None:
    """Print the costs of both ways."""
    base, adapter = work / "base", work / "adapter"
    run(MAKE, str(base), str(adapter), json.dumps(SHAPES[shape]), str(ROOT / "tests"))
    print(f"\n## {shape}, adapter of rank 16 on all linear layers\n")
    print("| quant | way | wall s | CPU s | peak GB | written GB |\n|---|---|---|---|---|---|")
    for quant in ("F16", "Q8_0", "Q4_K_M"):
        with tempfile.TemporaryDirectory(dir=work) as place:
            usual = chain(base, adapter, Path(place), quant, llama_cpp)
        with tempfile.TemporaryDirectory(dir=work) as place:
            inside = work / "inside.txt"
            ours = run(OURS, str(adapter), place, quant, str(inside))
            ours["quantising"] = float(inside.read_text())
            ours["written"] = float(size(Path(place)))
        for way, figures in (("chain", usual), ("ftadvisor", ours)):
            values = [figures["wall"], figures["cpu"], figures["peak"] / 1e9, figures["written"] / 1e9]
            print(f"| {quant} | {way} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
        apart = [one["cpu"] - one["quantising"] for one in (ours, usual)]
        shares = [f"{ours[key] / usual[key]:.2f}x" for key in ("wall", "cpu", "peak", "written")]
        print(f"| {quant} | share | " + " | ".join(shares) + " |")
        print(
            f"| {quant} | quantising alone | | chain {usual['quantising']:.2f}, ftadvisor "
            f"{ours['quantising']:.2f}; the rest {apart[0] / apart[1]:.2f}x | | |", flush=True,
        )  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, action="append", required=True)
    given = parser.parse_args()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    print(f"# Export, {time.strftime('%Y-%m-%d')}\n\n{cpu.partition(': ')[2]}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as place:
        for shape in given.shape:
            compare(shape, given.llama_cpp.resolve(), Path(place, shape))


if __name__ == "__main__":
    main()
