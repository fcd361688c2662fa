"""Talking to trained adapters: several on one base, changed without loading it again, the base untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from advisor.errors import RefusedError, UnknownNameError, UsageError
from training import events_of, make_run, rows, run_here, write_rows

torch = pytest.importorskip("torch")

from advisor.adapters import AdapterChat, find_voices  # noqa: E402 - after the check that torch is installed
from advisor.cli.main import app  # noqa: E402
from advisor.ui.talk import choose  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
FEW: dict[str, Any] = {"max_steps": 14, "save_every_steps": 14, "heldout_fraction": 0.0, "micro_batch": 8}
TUNERS = ("adapter", "lora", "ia3", "prompt_tuning", "prefix_tuning")
QUESTION = "What is the door like?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Two runs of each kind of tuner, that learned different answers."""
    place = tmp_path_factory.mktemp("adapters")
    files = {
        word: write_rows(place / f"{word}.jsonl", [{**row, "output": f"{word} {word}"} for row in rows(16)])
        for word in ("river", "bread")
    }
    made = {}
    for tuner in TUNERS:
        for word, data in files.items():
            if word == "bread" and tuner not in ("adapter", "lora"):
                continue
            folder = place / f"{word}-{tuner}"
            rate = {"adapter": 0.05, "lora": 0.01}.get(tuner, 0.5)
            made[folder.name] = make_run(
                folder, tuner=tuner, model=tiny_model, data=data, learning_rate=rate, **FEW
            )
            assert run_here(folder) == 0, events_of(folder, "error")
    return made


def session(*places: Path, **more: Any) -> AdapterChat:
    """Load what training left."""
    return AdapterChat(find_voices(places, offline=True, on_progress=lambda _: None), max_tokens=8, **more)


def ask(chat: AdapterChat, name: str) -> str:
    """Ask one of them, from the beginning."""
    chat.choose(name)
    chat.reset()
    return "".join(chat.reply(QUESTION))


@pytest.mark.parametrize("tuner", ["adapter", "lora"])
def test_adapters_share_a_base_and_answer_each_its_own(runs: dict[str, Path], tuner: str) -> None:
    """Changed back and forth, each gives the same answer again; with all off the base answers."""
    one, two = f"river-{tuner}", f"bread-{tuner}"
    chat = session(runs[one], runs[two])
    assert chat.names == (one, two, "base")
    first, second, base = (ask(chat, name) for name in (one, two, "base"))
    assert "river" in first
    assert "bread" in second
    assert not {"river", "bread"} & set(base.split())
    assert [ask(chat, name) for name in (one, "base", two)] == [first, base, second]
    assert chat.loaded_bases == 1


def test_it_says_what_the_whole_model_says(runs: dict[str, Path], tiny_model: Path) -> None:
    """For each kind of adapter, the streamed answer is the greedy one, computed anew for each token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name in (f"river-{tuner}" for tuner in TUNERS):
        chat = session(runs[name])
        answer = ask(chat, name)
        model = chat._model()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        made: list[int] = []
        with torch.no_grad():
            while len(made) < 8 and tokenizer.eos_token_id not in made:
                found = model(torch.tensor([ids + made]), use_cache=False).logits[0, -1]
                made.append(int(found.argmax()))
        assert answer == tokenizer.decode(made, skip_special_tokens=True), name


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_count_in_what_is_generated(tmp_path: Path, kind: str) -> None:
    """Each text of a batch goes on as computed anew for each token; a folder's name may have dots."""
    import transformers

    from advisor.train.generation import generation_inputs
    from families import make_family
    from methods import METHODS, make_adapter

    base = make_family(tmp_path / "base", "llama")
    chat = session(make_adapter(base, METHODS[kind], tmp_path / "v1.5", size=1.0))
    model, texts = chat._model(), [[5, 9, 77, 100, 3, 200, 17], [5, 9, 77, 100]]

    def anew(ids: list[int]) -> list[int]:
        with torch.no_grad():
            for _ in range(6):
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        return ids[-6:]

    ids, mask = torch.tensor([texts[0], [0, 0, 0, *texts[1]]]), torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    usual = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    speaker, text = generation_inputs(model, ids, mask)
    assert speaker.generate(**text, **usual)[:, -6:].tolist() == [anew(ids) for ids in texts]
    speaker, text = generation_inputs(model, ids, mask, adapted=False)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    alone = plain.generate(torch.tensor(texts[:1]), **usual)[0, -6:].tolist()
    assert speaker.generate(**text, **usual)[0, -6:].tolist() == alone
    assert alone != anew(texts[0])
    assert ask(chat, "v1.5") != ask(chat, "base")
    if kind == "prompt":  # trained in 32 bits whatever the base is stored in; a prefix follows the base
        model.get_base_model().to(torch.bfloat16)
        speaker, text = generation_inputs(model, ids, mask)
        assert speaker.generate(**text, **usual).shape[1] == text["input_ids"].shape[1] + 6


def test_another_kind_of_adapter_gets_a_copy_of_its_own(runs: dict[str, Path]) -> None:
    """PEFT does not mix kinds on one copy; the answers do not depend on who else is loaded."""
    names = ("river-ia3", "river-lora", "bread-lora")
    chat = session(*(runs[name] for name in names))
    assert chat.loaded_bases == 1
    together = [ask(chat, name) for name in names]
    assert chat.loaded_bases == 2
    assert together == [ask(session(runs[name]), name) for name in names]


def test_the_command_compares_runs_and_names_what_does_not_fit(runs: dict[str, Path]) -> None:
    """Each folder answers under its own name; options of GGUF files are refused beside folders."""
    places = [str(runs["river-lora"]), str(runs["bread-lora"])]
    arguments = ["chat", *places, "--prompt", QUESTION, "--max-tokens", "8"]
    answers = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["answers"]
    assert list(answers) == ["river-lora", "bread-lora"]
    assert "bread" in answers["bread-lora"]
    refused = CliRunner().invoke(app, [*arguments, "--lora", "x.gguf"], standalone_mode=False)
    assert isinstance(refused.exception, UsageError)


def test_a_reward_model_does_not_talk(tiny_model: Path, tmp_path: Path) -> None:
    """It gives marks; the refusal says so."""
    pairs = [{"prompt": QUESTION, "chosen": f"It is {n}.", "rejected": f"No {n}."} for n in range(8)]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    folder = make_run(
        tmp_path / "judge", tuner="lora", model=tiny_model, data=data, kind="preference", objective="reward",
        **(FEW | {"max_steps": 1, "micro_batch": 2, "weight_bits": 32}),
    )  # fmt: skip
    assert run_here(folder) == 0, events_of(folder, "error")
    with pytest.raises(RefusedError, match="gives marks"):
        session(folder)


def test_the_conversation_goes_on_when_the_adapter_changes(runs: dict[str, Path]) -> None:
    """What was said stays; an unknown name changes nothing."""
    chat = session(runs["river-lora"])
    "".join(chat.reply(QUESTION))
    with pytest.raises(UnknownNameError, match="rivr"):
        chat.choose("rivr")
    chat.choose("base")
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"]
    assert choose({"base": lambda strength: None}, "nothing", "base") == "base"
