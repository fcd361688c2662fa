"""Does every family, tied or not, with either tokenizer, become a right file, equal to the converter's?

`python benchmarks/export_matrix.py --llama-cpp DIR [--only FAMILY]`: DIR holds convert_hf_to_gguf.py, for
example of the source package of the installed llama-cpp-python. Prints tables in Markdown; keep them
under benchmarks/results/. The first is what `verify` measures; the second how many tensors equal, byte for
byte, those of the official converter (in Q4_K_M those of llama.cpp's quantiser on the converter's F32 file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_K_M")
# One process for all conversions: importing torch and transformers takes longer than a tiny model. The
# vocabulary is left out: the converter knows byte-level tokenizers by a checksum only, and no random one.
CONVERT = """
import json, sys, traceback
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from pathlib import Path
failed = {}
for job in json.loads(Path(sys.argv[2]).read_text()):
    try:
        hparams = ModelBase.load_hparams(Path(job["folder"]), False)
        found = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        found.set_vocab = lambda self: self._set_vocab_none()
        sys.argv = ["convert", job["folder"], "--outfile", job["file"], "--outtype", job["type"]]
        convert_hf_to_gguf.main()
    except (Exception, SystemExit) as problem:
        failed[job["file"]] = f"{type(problem).__name__}: {problem}"
print("FAILED " + json.dumps(failed))
"""
QUANTISE = """
import ctypes, json, sys, llama_cpp
from pathlib import Path
for job in json.loads(Path(sys.argv[1]).read_text()):
    if not Path(job["source"]).exists():
        continue
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    llama_cpp.llama_model_quantize(job["source"].encode(), job["file"].encode(), ctypes.byref(params))
"""


OTHERS: dict[str, dict[str, int | bool]] = {
    "StableLmConfig": {}, "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "CohereConfig": {"tie_word_embeddings": True}, "Starcoder2Config": {}, "OlmoConfig": {},
    "Glm4Config": {"head_dim": 64},
}  # fmt: skip
"""Not written here: through the converter, with the tokenizer that is."""


def combinations(only: str | None) -> list[tuple[str, bool, bool]]:
    """Return family, tied, SentencePiece-style for every model of the matrix."""
    from families import FAMILIES

    return [
        (family, tied, spm)
        for family in FAMILIES
        if only in (None, family)
        for tied in (True, False)
        for spm in (False, True)
    ]


def proved(folder: Path, family: str, *, tied: bool, spm: bool) -> str:
    """Make a model, export and verify it; return its row of the first table."""
    from advisor.errors import AdvisorError
    from advisor.export import export_model
    from advisor.verify import verify_gguf
    from families import make_family

    # The converter asks GPT-2 for a field that transformers no longer writes; it changes nothing.
    make_family(folder, family, tied=tied, spm=spm, config={"n_ctx": 256} if family == "gpt2" else None)
    try:
        made = export_model(folder, quants=QUANTS)
    except AdvisorError as refused:
        return f"refused: {refused.message}" + " |" * (len(QUANTS) + 2)
    cells, kinds = [], dict[str, set[bool]]()
    for file in made.files:
        proof = verify_gguf(Path(file.path), against=folder)
        checks = {check.name: check for check in proof.checks}
        for name in ("token_ids", "chat_template", "special_tokens"):
            kinds.setdefault(name, set()).add(checks[name].passed if name in checks else False)
        delta = checks["logits"].measured.get("max_delta")
        failed = ", ".join(check.name for check in proof.checks if not check.passed)
        cells.append(
            ("failed" if delta is None else f"{delta:.2g}") + (f" FAILED {failed}" if failed else "")
        )
    texts = checks["token_ids"].measured.get("texts")
    cells += [f"{texts} alike" if kinds["token_ids"] == {True} else "DIFFERENT"]
    cells += ["alike" if kinds["chat_template"] | kinds["special_tokens"] == {True} else "DIFFERENT"]
    return " | ".join(cells) + " |"


def through_converter(work: Path, llama_cpp: Path) -> None:
    """Print the table of architectures that the converter writes for us."""
    import torch
    import transformers

    from advisor.errors import AdvisorError
    from advisor.export import export_model
    from advisor.verify import verify_gguf
    from families import USUAL, make_family, randomise

    quants = ("F32", "F16", "Q8_0", "Q4_K_M")
    print("\n## Other architectures, through the converter: largest difference of a logit\n")
    print("| configuration | " + " | ".join(quants) + " |\n" + "|---" * (len(quants) + 1) + "|")
    for name, more in OTHERS.items():
        folder = make_family(work / name, "llama", tied=False)
        usual = USUAL | {
            "vocab_size": 512, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2,
            "pad_token_id": 0,
        }  # fmt: skip
        made = getattr(transformers, name)(**(usual | more))
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        randomise(model, small=False)
        model.save_pretrained(folder)
        cells = []
        try:
            for file in export_model(folder, quants=quants, llama_cpp=llama_cpp).files:
                proof = verify_gguf(Path(file.path), against=folder)
                failed = "; ".join(
                    f"{check.name}: {check.evidence}" for check in proof.checks if not check.passed
                )
                delta = next(
                    check.measured.get("max_delta") for check in proof.checks if check.name == "logits"
                )
                cells.append(f"{float(delta or 0):.2g}" + (f" FAILED {failed}" if failed else ""))
        except AdvisorError as refused:
            cells = [f"refused: {refused.message}", *[""] * (len(quants) - 1)]
        print(f"| {name.removesuffix('Config')} | " + " | ".join(cells) + " |", flush=True)


def official(folders: list[Path], llama_cpp: Path, work: Path) -> dict[str, str]:
    """Let the converter write every model in four types; return what failed, by file."""
    jobs = [
        {"folder": str(folder), "file": str(folder / f"official-{quant}.gguf"), "type": quant.lower()}
        for folder in folders
        for quant in QUANTS[:-1]
    ]
    todo = work / "jobs.json"
    todo.write_text(json.dumps(jobs))
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CONVERT, str(llama_cpp), str(todo)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    ).stdout  # fmt: skip
    todo.write_text(
        json.dumps(
            [
                {"source": str(folder / "official-F32.gguf"), "file": str(folder / "official-Q4_K_M.gguf")}
                for folder in folders
            ]
        )
    )
    subprocess.run([sys.executable, "-c", QUANTISE, str(todo)], stderr=subprocess.DEVNULL, check=True)
    failed: dict[str, str] = json.loads(said.rpartition("FAILED ")[2])
    return failed


def alike(ours: Path, theirs: Path) -> str:
    """Return how many tensors are the same, byte for byte, of how many; names of the first that differ."""
    from gguf import GGUFReader

    mine = {tensor.name: tensor for tensor in GGUFReader(ours).tensors}
    others = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    same = {
        name
        for name in mine.keys() & others.keys()
        if mine[name].tensor_type == others[name].tensor_type
        and mine[name].data.tobytes() == others[name].data.tobytes()
    }
    differing = sorted((mine.keys() | others.keys()) - same)
    return f"{len(same)}/{len(others)}" + (f" ({', '.join(differing[:3])})" if differing else "")


def equal(folder: Path, failed: dict[str, str]) -> str:
    """Return a model's row of the second table."""
    cells = []
    for quant in QUANTS:
        theirs, ours = (
            folder / f"official-{quant}.gguf",
            next((folder / "export").glob(f"*-{quant}.gguf"), None),
        )
        if ours is None:
            cells.append("refused")
        elif str(theirs) in failed or not theirs.exists():
            cells.append(failed.get(str(theirs), "not written")[:60])
        else:
            cells.append(alike(ours, theirs))
    return " | ".join(cells)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--only", help="One family, or `others`.")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    print(f"# Families, {time.strftime('%Y-%m-%d')}")
    print("\n## Largest difference of a logit; all checks passed unless told\n")
    print("| family | tied | tokenizer | " + " | ".join(QUANTS) + " | token ids | template, special tokens |")
    print("|---" * (len(QUANTS) + 5) + "|")
    with tempfile.TemporaryDirectory() as place:
        rows: dict[tuple[str, ...], Path] = {}
        for family, tied, spm in combinations(given.only):
            folder = Path(place, f"{family}-{tied}-{spm}")
            words = (family, "yes" if tied else "no", "SentencePiece" if spm else "byte-level")
            print(f"| {' | '.join(words)} | {proved(folder, family, tied=tied, spm=spm)}", flush=True)
            if not spm:
                rows[words] = folder
        print("\n## Tensors equal to the official converter's, byte for byte\n")
        print("| family | tied | " + " | ".join(QUANTS) + " |\n" + "|---" * (len(QUANTS) + 2) + "|")
        failed = official(list(rows.values()), given.llama_cpp.resolve(), Path(place))
        for words, folder in rows.items():
            print(f"| {words[0]} | {words[1]} | {equal(folder, failed)} |", flush=True)
        if given.only is None or given.only == "others":
            through_converter(Path(place), given.llama_cpp.resolve())


if __name__ == "__main__":
    main()
