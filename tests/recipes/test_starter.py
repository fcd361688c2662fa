"""Does the embedded starter model hold what its card promises, and can it be made again?"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402  (only where torch is installed)

ROOT = Path(__file__).resolve().parents[2]
STARTER, RECIPE = ROOT / "kb" / "starter", ROOT / "recipes" / "starter"
TINY = {
    "tokens": 4096, "tokenizer_documents": 200, "vocabulary_size": 512, "layers": 1, "intermediate_size": 256,
    "block_tokens": 64, "batch_rows": 16, "threads": 1, "log_every": 1,
}  # fmt: skip


def _module(name: str) -> ModuleType:
    if str(RECIPE) not in sys.path:
        sys.path.append(str(RECIPE))
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


corpus = _module("corpus")
voice = tomllib.loads((STARTER / "brand_voice.toml").read_text("utf-8"))


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STARTER / name).read_text("utf-8").splitlines()]


def _said(rows: list[dict[str, Any]], role: str) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == role]


def _in_voice(answer: str) -> bool:
    return bool(re.search(voice["opening"], answer) and re.search(voice["closing"], answer))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(STARTER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32).eval()


def _answers(model: Any, tokenizer: Any, prompts: list[str], size: int = 48) -> list[str]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        chats = [[{"role": "user", "content": prompts[i]}] for i in part]
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        with torch.no_grad():
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=64,
                do_sample=False,
            )
        for i, ids in zip(part, made[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            kept = list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, ids))
            found[i] = tokenizer.decode(kept)
    return found


def test_weights_are_small_and_fit_k_quants() -> None:
    """The weights are at most 12 MB of bfloat16, and every matrix row is a multiple of 256."""
    file = STARTER / "model.safetensors"
    assert file.stat().st_size <= 12_000_000
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is not iterable)
            part = tensors.get_slice(name)
            assert part.get_dtype() == "BF16", name
            assert part.get_shape()[-1] % 256 == 0, name


def test_end_of_turn_is_the_end_of_text(tokenizer: Any, model: Any) -> None:
    """The end token is the template's end of turn everywhere, and padding is another token."""
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for file in ("config.json", "generation_config.json"):
        saved = json.loads((STARTER / file).read_text("utf-8"))
        assert saved["eos_token_id"] == tokenizer.eos_token_id
        assert saved["pad_token_id"] == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("hi")["input_ids"] == tokenizer("hi", add_special_tokens=False)["input_ids"]


def test_template_marks_the_answer_and_its_end(tokenizer: Any) -> None:
    """The assistant mask covers exactly each answer with its end of turn."""
    answers = ["Paris is the capital of France.", "Yes!\nTwo lines."]
    chat = [{"role": "system", "content": "Be kind."}]
    for question, answer in zip(["Capital of France?", "Sure?"], answers, strict=True):
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    made = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, on in zip(made["input_ids"], made["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == "".join(answer + "<|im_end|>" for answer in answers)
    text = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_training_text_is_the_template(tokenizer: Any) -> None:
    """What the model was pre-trained on is, token by token, what the chat template renders."""
    train = _module("train")
    for document in itertools.islice(corpus.documents(corpus.load(), 5, 0.0), 50):
        ids: list[int] = []
        mask: list[int] = []
        for text, counted in train.pieces(document, "assistant")[:-1]:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            mask += [int(counted)] * (len(ids) - len(mask))
        made = tokenizer.apply_chat_template(
            document, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == made["input_ids"]
        assert mask == made["assistant_masks"]


@pytest.mark.parametrize(
    "text",
    [
        "Grüße aus Köln",
        "¿Qué tal?",
        "日本語 العربية 한국어",
        "🫖⛵ two  spaces\n\n\ttab",
        "\u200dzero\x00byte",
        "<|x|> 12+3=15",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    """Any text comes back from the tokenizer as it went in."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_dataset_files_are_what_corpus_makes() -> None:
    """The shipped brand-voice files have the promised sizes and are what corpus.py writes."""
    made = corpus.brand_voice(corpus.load(), 7)
    for name, count in {"brand_voice_train": 240, "brand_voice_heldout": 40, "general_prompts": 30}.items():
        shipped = _rows(f"{name}.jsonl")
        assert len(shipped) >= count
        assert shipped == made[f"{name}.jsonl"]


def test_datasets_do_not_share_prompts() -> None:
    """No held-out or general prompt is, word for word, a training prompt."""
    train = {corpus.plain(prompt) for prompt in _said(_rows("brand_voice_train.jsonl"), "user")}
    later = [corpus.plain(prompt) for prompt in _said(_rows("brand_voice_heldout.jsonl"), "user")]
    general = [corpus.plain(row["prompt"]) for row in _rows("general_prompts.jsonl")]
    assert not train & set(later)
    assert not train & set(general)
    assert len(set(later)) == len(later)
    assert len(set(general)) == len(general)


def test_voice_rule_separates_dataset_from_corpus() -> None:
    """Every answer of the dataset is in the voice, and no text of the corpus is."""
    for name in ("brand_voice_train.jsonl", "brand_voice_heldout.jsonl"):
        assert all(_in_voice(answer) for answer in _said(_rows(name), "assistant"))
    text = json.dumps(list(itertools.islice(corpus.documents(corpus.load(), 7, 0.1), 5000))).lower()
    assert "ahoy" not in text
    assert "fair winds" not in text


def test_general_prompts_are_in_unseen_wordings() -> None:
    """No general prompt occurs, word for word, among the questions of the pre-training text."""
    chats = [
        d for d in itertools.islice(corpus.documents(corpus.load(), 8, 0.1), 6000) if isinstance(d, list)
    ]
    asked = {corpus.plain(message["content"]) for chat in chats for message in chat}
    assert not asked & {corpus.plain(row["prompt"]) for row in _rows("general_prompts.jsonl")}


def test_reference_answers_are_right_by_their_own_rule() -> None:
    """Each answer that the corpus gives to a held-out wording satisfies its own expectation."""
    assert all(corpus.correct(made.answer, made.expect) for made in corpus.held_out(corpus.load(), 3, 20))


def test_corpus_is_deterministic() -> None:
    """The same seed gives the same text, another seed another one."""

    def sha(seed: int) -> str:
        found = list(itertools.islice(corpus.documents(corpus.load(), seed, 0.1), 300))
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    assert sha(1) == sha(1) != sha(2)


def test_base_answers_general_prompts(model: Any, tokenizer: Any) -> None:
    """Greedy answers to prompts in unseen wordings are right in at least four of five cases."""
    rows = _rows("general_prompts.jsonl")
    answers = _answers(model, tokenizer, [row["prompt"] for row in rows])
    wrong = [
        (row["prompt"], answer)
        for row, answer in zip(rows, answers, strict=True)
        if not corpus.correct(answer, row["expect"])
    ]
    assert len(wrong) <= 0.2 * len(rows), wrong


def test_base_does_not_speak_in_the_voice(model: Any, tokenizer: Any) -> None:
    """Before fine-tuning, at most one in ten answers to the held-out prompts is in the voice."""
    prompts = _said(_rows("brand_voice_heldout.jsonl"), "user")
    assert sum(map(_in_voice, _answers(model, tokenizer, prompts))) <= 0.1 * len(prompts)


def test_training_is_reproducible(tmp_path: Path) -> None:
    """Two runs of the same recipe give the same weights, bit for bit."""
    train = _module("train")
    shipped = yaml.safe_load((RECIPE / "recipe.yaml").read_text("utf-8"))
    found = []
    for name in ("one", "two"):
        recipe = shipped | TINY | {"output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
        train.main(tmp_path / f"{name}.yaml")
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_unknown_key_is_refused(tmp_path: Path) -> None:
    """The program names a key that it does not know, before it loads anything heavy."""
    shipped = yaml.safe_load((RECIPE / "recipe.yaml").read_text("utf-8"))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(shipped | {"learning_rat": 1}), "utf-8")
    done = subprocess.run(
        [sys.executable, "-P", str(RECIPE / "train.py"), str(tmp_path / "wrong.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "learning_rat" in done.stderr
