"""A tiny file served to the openai client, and system prompts kept from one start to the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from advisor.chat import ChatSession
from advisor.cli.main import run
from advisor.export import export_model
from tiny import make_tiny_model

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("served") / "model")
    return Path(export_model(folder, quants=("F32",)).files[0].path)


@pytest.fixture(scope="module")
def address(gguf: Path) -> Iterator[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    command = [
        sys.executable,
        "-m",
        "advisor",
        "serve",
        str(gguf),
        "--port",
        "0",
        "--json",
        "--api-key",
        "key",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        line = child.stdout.readline()
        if not line:
            pytest.fail(child.stderr.read().decode())
        told = json.loads(line)
        assert (told["schema"], told["running"]["cache"]) == ("ftadvisor.serve/1", "f16")
        yield told["url"]
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert "Traceback" not in child.stderr.read().decode()


def test_openai_client_is_answered_as_chat_answers(address: str, gguf: Path) -> None:
    """Greedy answers over the interface are those of `chat`, whole and streamed."""
    session = ChatSession(gguf, max_tokens=16)
    expected = "".join(session.reply("Hello"))
    session.close()
    with openai.OpenAI(base_url=address, api_key="key", max_retries=0) as client:
        asked = [{"role": "user", "content": "Hello"}]
        given = {"model": gguf.stem, "messages": asked, "max_tokens": 16, "temperature": 0}
        answer = client.chat.completions.create(**given)
        assert answer.choices[0].message.content == expected
        pieces = client.chat.completions.create(**given, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        assert [model.id for model in client.models.list()] == [gguf.stem]


def test_what_clients_send_is_understood_or_refused_in_words(address: str, gguf: Path) -> None:
    """Text in parts is one text; what is no text, no list of messages, no JSON is an error of the caller."""
    with openai.OpenAI(base_url=address, api_key="key", max_retries=0) as client:

        def ask(content: object) -> str | None:
            asked: list[Any] = [{"role": "user", "content": content}]
            answer = client.chat.completions.create(
                model=gguf.stem, messages=asked, max_tokens=8, temperature=0
            )
            return answer.choices[0].message.content

        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        assert ask(parts) == ask("Hello")
        with pytest.raises(openai.BadRequestError, match="a part of type 'image_url'"):
            ask([{"type": "image_url", "image_url": {"url": "data:,"}}])
        with pytest.raises(openai.BadRequestError, match="messages: Input should be a valid list"):
            client.chat.completions.create(model=gguf.stem, messages="secret")
        with pytest.raises(openai.BadRequestError, match="context length is 512 tokens"):
            ask("word " * 4000)
    for page, content, status in (("/v1/chat/completions", b"no json", 400), ("/docs", None, 404)):
        asked = urllib.request.Request(
            address.removesuffix("/v1") + page, content, {"Authorization": "Bearer key"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(asked):
            pass
        assert refused.value.code == status
        refused.value.close()


def test_only_those_with_the_key_on_this_machine_are_answered(address: str) -> None:
    """Without the key there is no answer, nor for a page that reaches the port under another name."""
    with (
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    headers = {"Host": "evil.example"}
    with (
        openai.OpenAI(base_url=address, api_key="key", max_retries=0, default_headers=headers) as client,
        pytest.raises(openai.BadRequestError),
    ):
        client.models.list()


def test_taken_port_is_named(address: str, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another server on the port is told in words."""
    port = address.split(":")[2].split("/")[0]
    assert run(["serve", str(gguf), "--port", port]) == 2
    assert f"Port {port}" in capsys.readouterr().err


def test_long_system_prompt_is_kept_for_the_next_start(gguf: Path, tmp_path: Path) -> None:
    """What was computed of it is read back, not computed again, and the answer is the same."""
    system = "You answer briefly and kindly, with care for details, numbers and dates. " * 7
    answers, reused = [], []
    for _ in range(2):
        session = ChatSession(gguf, system=system, max_tokens=12, prompt_cache=tmp_path)
        answers.append("".join(session.reply("Hello")))
        reused.append(session.reused_prompt)
        session.close()
    assert reused == [False, True]
    assert answers[0] == answers[1]
    file = next(tmp_path.glob("*.state"))
    file.write_bytes(file.read_bytes()[:100])
    session = ChatSession(gguf, system=system, max_tokens=12, prompt_cache=tmp_path)
    assert ("".join(session.reply("Hello")), session.reused_prompt) == (answers[0], False)
    session.close()
    session = ChatSession(gguf, system=system, max_tokens=12, prompt_cache=file / "below a file")
    assert "".join(session.reply("Hello")) == answers[0], "where nothing can be kept, it is computed"
    session.close()


def test_cache_of_eight_bits_answers(gguf: Path) -> None:
    """Eight bits come with flash attention; llama.cpp makes the context and answers."""
    session = ChatSession(gguf, cache="q8_0", max_tokens=8)
    assert session.running.flash_attention
    assert list(session.reply("Hello"))
    session.close()
