"""Talks to trained models as training left them: several adapters on one base, changed without loading again.

Goes in: run folders, adapter folders, model folders. Comes out: answers, piece by piece, of the one that is
chosen. Never does: print; merge; use the network under `offline`; keep two copies of a base where one will do
(adapters of one kind share it; PEFT does not put different kinds onto the same copy).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from peft import PeftModel
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from advisor.errors import InputError, ModelError, RefusedError, UnknownNameError
from advisor.export.checkpoint import read_json
from advisor.export.source import adapters_apart, find_trained
from advisor.probe.host import memory
from advisor.probe.load import free_cores
from advisor.resources import starter_dir
from advisor.templates import newest_turns
from advisor.train import bottleneck
from advisor.train.generation import generation_inputs
from advisor.types import Record
from advisor.units import format_bytes

BASE = "base"
"""The name under which every adapter is off."""
CONTEXT_TOKENS = 4096
ADAPTER_CONFIG = "adapter_config.json"


class Voice(Record, frozen=True, kw_only=True):
    """One trained model that can be chosen."""

    name: str
    base: str
    """Folder of the base weights."""
    adapter: str | None
    """Folder of the adapter; None: the weights are the model itself."""
    kind: str
    """PEFT's type of the adapter, BOTTLENECK for our own, or an empty text."""
    tokenizer: str


def find_voices(
    places: Sequence[Path], *, offline: bool, on_progress: Callable[[str], None]
) -> tuple[Voice, ...]:
    """Find what can be talked to in run folders, adapter folders and model folders; names are made different.

    Raises:
        InputError: a folder holds no trained model.
        RefusedError: one is a reward model, which gives marks and no answers.
        ModelError, HubError: the base of an adapter is out of reach.
    """
    found: dict[str, Voice] = {}
    for place in (one for given in places for one in adapters_apart(given) or (given,)):
        trained = find_trained(_result(place), offline=offline, on_progress=on_progress)
        config = read_json(Path(trained.adapter) / ADAPTER_CONFIG) if trained.adapter else {}
        judge = any("SequenceClassification" in name for name in trained.config.get("architectures") or ())
        if judge or config.get("task_type") == "SEQ_CLS":
            raise RefusedError(
                f"{place} holds a reward model: it gives marks, it does not talk.",
                "Talk to the stage that was trained against it.",
            )
        name = _new_name(place, {*found, BASE})
        found[name] = Voice(
            name=name, base=trained.base, adapter=trained.adapter, kind=str(config.get("peft_type", "")),
            tokenizer=trained.tokenizer,
        )  # fmt: skip
    return tuple(found.values())


def _result(place: Path) -> Path:
    """Return the trained folder of a finished stage (`RUN/stages/1-sft`), else the place itself."""
    if str(place) == "starter" and not place.exists():
        return starter_dir()
    if place.is_dir() and not any(place.glob("recipe*.yaml")):
        return next((place / name for name in ("adapter", "model") if (place / name).is_dir()), place)
    return place


def _new_name(place: Path, taken: set[str]) -> str:
    whole = place.resolve()
    for name in (whole.name, f"{whole.parent.name}/{whole.name}"):
        if name not in taken:
            return name
    return next(
        name for number in range(2, len(taken) + 3) if (name := f"{whole.name}-{number}") not in taken
    )


class AdapterChat:
    """One conversation with one of several trained models; keeps what was said."""

    def __init__(
        self,
        voices: Sequence[Voice],
        *,
        system: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        """Choose the first voice and load it; the others when they are chosen for the first time.

        Args:
            voices: what can be chosen, beside the base of the chosen one.
            system: said before the conversation.
            temperature: 0 takes the likeliest token each time.
            max_tokens: longest answer.
            seed: of the sampling.

        Raises:
            RefusedError: there is not enough memory.
            ModelError: the weights cannot be loaded, or the adapter does not fit.
        """
        self._voices = {voice.name: voice for voice in voices}
        self._system, self._temperature, self._max_tokens = system, temperature, max_tokens
        self._bases: dict[tuple[str, str], Any] = {}
        self._on: dict[tuple[str, str], set[str]] = {}
        self._tokenizers: dict[str, Any] = {}
        self.messages: list[dict[str, str]] = []
        self._voice = next(iter(self._voices.values()))
        self.chosen = ""
        self.choose(self._voice.name)
        self.reset()
        torch.manual_seed(seed)

    @property
    def voices(self) -> tuple[str, ...]:
        """Return the trained models, in the order they were given."""
        return tuple(self._voices)

    @property
    def names(self) -> tuple[str, ...]:
        """Return what can be chosen; `base` where there is an adapter to switch off."""
        base = (BASE,) if any(voice.adapter for voice in self._voices.values()) else ()
        return (*self._voices, *base)

    @property
    def loaded_bases(self) -> int:
        """Return how many copies of base weights are in memory."""
        return len(self._bases)

    def choose(self, name: str) -> None:
        """Answer as this trained model from now on; `base` switches the adapter of the chosen one off.

        What was said stays, so that the same conversation goes on with another voice.

        Raises:
            UnknownNameError: there is no such name.
            RefusedError, ModelError: as the constructor.
        """
        if name != BASE or name in self._voices:
            if name not in self._voices:
                raise UnknownNameError("adapter", name, self.names)
            self._voice = self._voices[name]
            self._load(self._voice)
        self.chosen = name

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def close(self) -> None:
        """Let the memory go."""
        self._bases.clear()
        self._on.clear()

    def reply(self, text: str) -> Iterator[str]:
        """Say something and yield the answer as it is generated; both are remembered.

        Raises:
            InputError: the text does not fit, or the template refuses the conversation.
        """
        ids = self._prompt({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._generate(ids):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    # --- loading ---------------------------------------------------------------------------------

    def _load(self, voice: Voice) -> None:
        """Have the base in memory once for each kind of adapter, and this adapter on it and chosen."""
        key = _shared_by(voice)
        if voice.tokenizer not in self._tokenizers:
            self._tokenizers[voice.tokenizer] = transformers.AutoTokenizer.from_pretrained(
                voice.tokenizer, local_files_only=True
            )
        try:
            if key not in self._bases:
                self._bases[key], self._on[key] = _load_base(voice), set()
            model, loaded = self._bases[key], self._on[key]
            if voice.adapter is not None and voice.name not in loaded:
                self._bases[key] = _put_on(model, voice, self._key(voice), first=not loaded)
                loaded.add(voice.name)
        except (OSError, ValueError, RuntimeError, KeyError) as problem:
            raise ModelError(
                f"{voice.name} cannot be loaded: {str(problem).strip().splitlines()[0]}",
                "For an adapter: check that it belongs to this base. Else: ftadvisor doctor",
            ) from problem
        model = self._bases[key]
        if isinstance(model, PeftModel):
            model.set_adapter(self._key(voice))
        else:
            bottleneck.choose(model, self._key(voice) if voice.adapter is not None else None)
        model.eval()

    def _key(self, voice: Voice) -> str:
        """Return a name for the libraries: no module may have a dot in its own, as folders do."""
        return f"voice-{self.voices.index(voice.name)}"

    def _model(self) -> Any:
        return self._bases[_shared_by(self._voice)]

    @contextlib.contextmanager
    def _adapter(self, model: Any) -> Iterator[None]:
        """Switch the adapter off meanwhile where the base was chosen."""
        with contextlib.ExitStack() as stack:
            if self._is_off and isinstance(model, PeftModel):
                stack.enter_context(model.disable_adapter())
            elif self._is_off and self._voice.adapter is not None:
                bottleneck.choose(model, None)
                stack.callback(bottleneck.choose, model, self._key(self._voice))
            yield

    @property
    def _is_off(self) -> bool:
        return self.chosen == BASE and BASE not in self._voices

    # --- answering -------------------------------------------------------------------------------

    def _prompt(self, message: dict[str, str]) -> list[int]:
        """Return the token ids of the conversation; the oldest turns make room, the system prompt stays."""
        known = int(getattr(self._model().config, "max_position_embeddings", CONTEXT_TOKENS))
        context = min(known, CONTEXT_TOKENS)
        room = context - min(self._max_tokens, context // 4)
        self.messages, ids = newest_turns([*self.messages, message], self._ids, room=room)
        return ids

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        tokenizer = self._tokenizers[self._voice.tokenizer]
        if tokenizer.chat_template is None:
            return list(tokenizer(turns[-1]["content"]).input_ids)
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as problem:
            raise InputError(
                f"The chat template refuses this conversation: {problem}", "Start again, without --system."
            ) from problem
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def _generate(self, ids: list[int]) -> Iterator[str]:
        """Yield what the library generates in a thread of its own; leaving the loop stops it."""
        model, tokenizer = self._model(), self._tokenizers[self._voice.tokenizer]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, problems = _Stop(), list[BaseException]()
        given = torch.tensor([ids], device=next(model.parameters()).device)
        arguments: dict[str, Any] = {
            "streamer": streamer, "max_new_tokens": self._max_tokens,
            "stopping_criteria": StoppingCriteriaList([stop]), "do_sample": self._temperature > 0,
            "eos_token_id": _ends(model, tokenizer), "pad_token_id": tokenizer.pad_token_id or 0,
        }  # fmt: skip
        if self._temperature > 0:
            arguments["temperature"] = self._temperature

        def work() -> None:
            try:
                with torch.inference_mode(), self._adapter(model), warnings.catch_warnings():
                    # peft asks transformers for names that transformers renames.
                    warnings.simplefilter("ignore", FutureWarning)
                    speaker, text = generation_inputs(
                        model, given, torch.ones_like(given), adapted=not self._is_off
                    )
                    speaker.generate(**text, **arguments)
            except (RuntimeError, ValueError, MemoryError) as problem:
                problems.append(problem)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.asked = True
            thread.join()
        if problems:
            raise ModelError(f"The model stopped: {problems[0]}", "Try a shorter text, or ftadvisor doctor.")


def _shared_by(voice: Voice) -> tuple[str, str]:
    """Return what tells the copy of the base that this voice needs from others."""
    return voice.base, "" if voice.kind == bottleneck.KIND else voice.kind


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends a generation that nobody reads any more."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)


def _load_base(voice: Voice) -> Any:
    """Load base weights: on the accelerator as stored, on CPU in 32 bits where there is room for them.

    Raises:
        RefusedError: there is not enough memory.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(min(torch.get_num_threads(), free_cores()))
    if torch.cuda.is_available():
        dtype, device = "auto", "cuda"
    else:
        dtype, device = _cpu_dtype(Path(voice.base)), "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        voice.base, dtype=dtype, local_files_only=True
    ).to(device)
    return model.requires_grad_(requires_grad=False)


def _cpu_dtype(folder: Path) -> Any:
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _, free = memory(Path("/proc"), Path("/sys"))
    if stored > free:
        raise RefusedError(
            f"{folder.name} needs {format_bytes(stored)} of memory; {format_bytes(free)} is free.",
            "Close other programs, or talk to a smaller file: ftadvisor export RUN --quant Q4_K_M",
        )
    return torch.float32 if 2 * stored < free else "auto"


def _put_on(model: Any, voice: Voice, key: str, *, first: bool) -> Any:
    """Return the model with one more adapter on it."""
    if voice.kind == bottleneck.KIND:
        bottleneck.load(model, Path(str(voice.adapter)), name=key)
        return model
    with warnings.catch_warnings():
        # peft asks transformers for names that transformers renames: nothing that a person can act on.
        warnings.simplefilter("ignore", FutureWarning)
        if first:
            return PeftModel.from_pretrained(model, voice.adapter, adapter_name=key)
        model.load_adapter(voice.adapter, adapter_name=key)
    return model


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    named = model.generation_config.eos_token_id
    found = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    return sorted(found) or None
