"""What kb/rules/tuners.toml states of a tuner is what the installed PEFT trains and keeps."""

from __future__ import annotations

from typing import Any

import pytest

from advisor import knowledge
from advisor.errors import UnknownNameError
from advisor.estimate import stated
from advisor.estimate.layers import Linear
from advisor.estimate.memory import estimate_memory, trainable_parameters
from advisor.types import MemorySettings
from tests.unit.estimate_cases import spec

pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import torch  # noqa: E402 - after the skip

from advisor.train.trace import Ledger  # noqa: E402 - after the skip

TABLES = knowledge.load().rules["tuners"]
RULES = knowledge.load().rules["memory"]
INPUTS, OUTPUTS, RANK, TOKENS = 256, 128, 16, 96
LAYER = Linear(name="v_proj", inputs=INPUTS, outputs=OUTPUTS)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": RANK, "target_r": 4, "total_step": 100}),
    "beft": ("BeftConfig", {}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "deft": ("DeftConfig", {"r": RANK}),
    "deft-para": ("DeftConfig", {"r": RANK, "para": True}),
    "delora": ("DeloraConfig", {"r": RANK}),
    "fourierft": ("FourierFTConfig", {"n_frequency": RANK}),
    "glora": ("GloraConfig", {"r": RANK}),
    "gralora": ("GraloraConfig", {"r": RANK}),
    "hira": ("HiraConfig", {"r": RANK}),
    "loha": ("LoHaConfig", {"r": RANK}),
    "lokr": ("LoKrConfig", {"r": RANK, "decompose_factor": 4}),
    "miss": ("MissConfig", {"r": RANK}),
    "miss-bat": ("MissConfig", {"r": RANK, "init_weights": "bat"}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": RANK}),
    "peanut": ("PeanutConfig", {"r": RANK}),
    "psoft": ("PsoftConfig", {"r": RANK}),
    "pvera": ("PveraConfig", {"r": RANK}),
    "randlora": ("RandLoraConfig", {"r": RANK}),
    "tinylora": ("TinyLoraConfig", {"r": RANK}),
    "vera": ("VeraConfig", {"r": RANK}),
}


class Block(torch.nn.Module):
    """One frozen layer in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Any) -> Any:
        """Return the product."""
        return self.v_proj(x)


def held(config: Any) -> tuple[int, int, int]:
    """Return trained parameters, bytes of all parameters, and bytes that a forward pass leaves."""
    with torch.device("meta"):
        model: Any = Block().requires_grad_(False)
        if config is not None:
            model = peft.get_peft_model(model, config)
        before = torch.zeros(1, TOKENS, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    model.train()
    ledger = Ledger(vocabulary=0)
    with ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor)
        weights = ledger.now
        answer = model(before * 1)  # the layer's input stays only where it is kept
        kept = ledger.now - weights
    assert answer.shape == (1, TOKENS, OUTPUTS)
    return sum(one.numel() for one in model.parameters() if one.requires_grad), weights, kept


@pytest.fixture(scope="module")
def plain() -> tuple[int, int, int]:
    """The layer without a tuner."""
    return held(None)


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_and_keeps_what_is_stated(name: str, plain: tuple[int, int, int]) -> None:
    """On one layer: the parameters exactly, the bytes within 2% of what the tuner adds."""
    kind, given = CONFIGS[name]
    config = getattr(peft, kind)(target_modules=["v_proj"], **given)
    trained, weights, kept = held(config)
    memory = stated.stated_tuner(name, TABLES)
    assert memory is not None
    assert trained == stated.trained(memory, [LAYER], 1, RANK)
    frozen = weights - plain[1] - 4 * trained
    assert frozen == pytest.approx(stated.frozen_bytes(memory, [LAYER], 1, RANK), abs=2048)
    wanted = TOKENS * stated.token_bytes(memory, [LAYER], RANK) + stated.kept_bytes(memory, [LAYER], RANK)
    assert kept - plain[2] == pytest.approx(wanted, rel=0.02, abs=4096)


def test_a_stated_tuner_is_estimated_and_another_is_not() -> None:
    """LoHa costs more than LoRA of its rank; a name of which nothing is stated is an error."""
    model = spec(layers=4, hidden=512, intermediate=1024, heads=8, kv_heads=8, head_dim=64, vocab=1000)
    loha = MemorySettings(tuner="loha", stated=stated.stated_tuner("loha", TABLES), target="q_v")
    lora = MemorySettings(tuner="lora", target="q_v")
    assert trainable_parameters(model, loha) == 2 * trainable_parameters(model, lora)
    more, less = (estimate_memory(model, one, RULES).allocated_bytes.expected for one in (loha, lora))
    assert more > less
    with pytest.raises(UnknownNameError, match="zoha"):
        estimate_memory(model, MemorySettings(tuner="zoha"), RULES)
