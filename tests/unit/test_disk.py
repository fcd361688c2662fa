"""The disk estimate: sizes of files that exist, and what full tuning and adapters leave behind."""

from __future__ import annotations

import msgspec
import pytest

from advisor.estimate.disk import estimate_disk, gguf_bytes
from advisor.types import MemorySettings, ModelSpec
from tests.unit.estimate_cases import LLAMA_8B

BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_K_M": 4.89}


def disk(
    model: ModelSpec = LLAMA_8B, tuner: str = "lora", keep: int = 2, quants: tuple[str, ...] = ()
) -> dict[str, int]:
    return estimate_disk(
        model,
        MemorySettings(tuner=tuner),
        tuner=tuner,
        keep_checkpoints=keep,
        quants=quants,
        bits_per_weight=BITS,
    )


@pytest.mark.parametrize(
    ("quant", "published"), [("F16", 16_068_891_000), ("Q8_0", 8_540_771_000), ("Q4_K_M", 4_920_734_000)]
)
def test_gguf_files_of_an_8b_model(quant: str, published: int) -> None:
    """Sizes of Llama-3.1-8B as it is published in GGUF: within 1%."""
    assert gguf_bytes(LLAMA_8B, BITS[quant]) == pytest.approx(published, rel=0.01)


def test_a_local_model_is_not_downloaded() -> None:
    """A folder on this machine costs no download; a hub model costs its weights."""
    assert disk()["download"] == pytest.approx(16.06e9, rel=0.01)
    assert disk(msgspec.structs.replace(LLAMA_8B, path="/models/x"))["download"] == 0


def test_full_tuning_leaves_whole_models_and_adapters_small_files() -> None:
    """Each checkpoint holds weights and two optimizer states; adapters take a hundredth."""
    full, lora = disk(tuner="full"), disk(tuner="lora")
    assert full["result"] == pytest.approx(16.06e9, rel=0.01)
    assert lora["result"] < full["result"] / 50
    assert full["checkpoints"] == 3 * 3 * full["result"]


def test_more_checkpoints_and_more_files_take_more() -> None:
    """The total is the sum, and grows with what is kept."""
    few, many = disk(keep=1), disk(keep=3, quants=("F16", "Q4_K_M"))
    assert many["total"] > few["total"]
    for found in (few, many):
        assert found["total"] == sum(size for name, size in found.items() if name != "total")


def test_a_quantisation_without_known_bits_is_an_error() -> None:
    """A name that is not in the table is not taken as free."""
    with pytest.raises(KeyError, match="Q9"):
        disk(quants=("Q9",))
