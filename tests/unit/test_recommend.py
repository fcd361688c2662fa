"""Each rule of the recommender by itself: what it allows, what it turns down, and that it says why."""

from __future__ import annotations

import msgspec
import pytest

from advisor.errors import UnknownNameError, UsageError
from advisor.knowledge import load
from advisor.recommend import advise, recommend
from advisor.recommend.amount import epochs_for
from advisor.recommend.gates import Proposal
from advisor.recommend.lengths import lengths_of
from advisor.recommend.situation import read_situation, rows_of, unequal_ratio
from advisor.recommend.weigh import data_excess
from advisor.types import DatasetProfile
from advisor.units import GIB
from cases import (
    A100,
    CPU,
    LLAMA_8B,
    M2,
    RTX_3060,
    RTX_4090,
    T4,
    chain,
    codes,
    plan,
    rejected,
    rows,
    scenario,
)

K = load()
H100_8 = {"accelerator": "H100", "count": 8, "memory_gib": 80, "bf16": True, "ram_gib": 1024}


# --- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datasets", "expected"),
    [
        ([rows()], ["sft"]),
        ([rows("preference")], ["dpo"]),
        ([rows("chat"), rows("preference")], ["sft", "dpo"]),
        ([rows("unpaired_preference")], ["kto"]),
        ([rows("chat"), rows("unpaired_preference")], ["sft", "kto"]),
        ([rows("prompts_with_answers", baseline_pass_rate=0.4)], ["grpo"]),
        ([rows("chat"), rows("preference"), rows("prompts")], ["sft", "reward", "rloo"]),
        ([{"kind": "raw_text", "size_mb": 2000}], ["cpt"]),
        ([{"kind": "raw_text", "size_mb": 2000}, rows()], ["cpt", "sft"]),
    ],
)
def test_the_data_decide_about_the_chain(datasets: list[dict[str, object]], expected: list[str]) -> None:
    """Demonstrations, pairs, thumbs, checkable answers and text each lead to their objectives."""
    assert chain(plan(*datasets, hardware=A100)) == expected


def test_a_goal_does_not_override_the_data() -> None:
    """The word `reasoning` without checkable answers is trained by demonstrations."""
    made = plan(rows(), text="better reasoning")
    assert chain(made) == ["sft"]
    assert "marks the answers" in rejected(made, "grpo")


@pytest.mark.parametrize("setting", ["reward_functions", "reward_file", "reward_model", "rloo.reward_file"])
def test_a_named_reward_marks_the_answers(setting: str) -> None:
    """Prompts alone are reinforced where a setting says what gives marks, without any word in the goal."""
    asked = "rloo" if setting.startswith("rloo.") else None
    made = plan(rows("prompts"), overrides={setting: "length"}, requested_method=asked)
    assert (chain(made), made.verdict) == ([asked or "grpo"], "train")
    assert plan(rows("prompts")).verdict == "dont_train_yet"


def test_what_is_insisted_on_is_done_unless_it_is_impossible() -> None:
    """--force trains a method that was advised against, and is offered only where it would help."""
    never = rows("prompts_with_answers", 3000, baseline_pass_rate=0.0)
    advised = plan(never, requested_method="grpo")
    assert (chain(advised), advised.verdict) == (["sft", "grpo"], "change_plan")
    assert "method_changed" in codes(advised)
    forced = plan(never, requested_method="grpo", force=True)
    assert (chain(forced), forced.verdict) == (["grpo"], "train")
    assert "needs_nonzero_success" in codes(forced)
    for force in (False, True):
        made = plan(rows(), requested_method="full", force=force)
        assert made.method == "lora"
        assert "method_impossible" in codes(made)
        assert "method_changed" not in codes(made)


def test_settings_that_do_not_fit_are_not_called_a_plan() -> None:
    """An override beyond the memory changes the verdict and the figures of the headline."""
    made = plan(rows(), overrides={"micro_batch": 512, "effective_batch": 512})
    assert made.verdict == "change_plan"
    assert made.summary.startswith("Your settings do not fit: ")
    assert "does_not_fit" in codes(made)
    with pytest.raises(UsageError, match="names no layer"):
        plan(rows(), overrides={"target": "foo"})


def test_data_without_contrast_are_mended_first() -> None:
    """Labels that are all alike, and prompts that are all solved already, teach nothing."""
    for share in (0.0, 1.0):
        made = plan(rows("unpaired_preference", 4000, positive_fraction=share))
        assert made.verdict == "fix_data_first"
        assert "no_contrast" in codes(made)
        assert "undesirable_over_desirable_weight" not in made.stages[0].settings
    solved = plan(rows("prompts_with_answers", 4000, baseline_pass_rate=0.97))
    assert solved.verdict == "fix_data_first"


def test_few_pairs_take_enough_steps_or_none() -> None:
    """Sixty pairs are too few to prefer anything by; three hundred get small batches."""
    few = plan(rows("preference", 60))
    assert (few.method, few.verdict) == ("none_prompting", "dont_train_yet")
    assert "collect" in few.summary
    assert plan(rows("prompts_with_answers", 10)).method == "none_prompting"
    made = plan(rows("preference", 300, on_policy=True))
    assert made.stages[-1].settings["effective_batch"] == 8


def test_unequal_tasks_count_with_their_cap_and_separate_ones_alone() -> None:
    """What the cap leaves decides the passes; with an adapter for each task, one task's rows do."""
    capped = plan(rows(count=0, task_rows=[500, 20000, 300000, 1200]), hardware=A100)
    assert capped.method == "lora"
    assert capped.stages[0].settings["epochs"] == 2
    apart = plan(
        rows(count=500, tasks=200),
        model="Qwen/Qwen3-4B-Instruct-2507",
        storage_per_task_kb=200,
        hardware=A100,
    )
    assert float(str(apart.stages[0].settings["epochs"])) > 1
    assert "separate_adapters" in codes(apart)
    assert "mixing_cap" not in codes(apart)


def test_an_unlisted_card_says_what_was_assumed() -> None:
    """Old names get no bf16; an unknown speed is said and does not choose the model."""
    old = plan(rows(), hardware={"accelerator": "GTX 1050", "memory_gib": 4}, model="auto")
    assert old.stages[0].settings["precision"] == "fp16"
    assert "no_bf16" in codes(old)
    new = plan(
        rows("chat", 20000),
        hardware={"accelerator": "X1", "vendor": "nvidia", "memory_gib": 96},
        model="auto",
    )
    assert any("is not in kb/hardware" in text for text in new.assumptions)
    assert new.model is not None
    assert new.model.parameters > 6e9


def test_small_devices_are_small() -> None:
    """Megabytes are understood, and nothing is planned for a device that holds no model."""
    assert plan(rows(), deploy="phone with 512 MB", model="auto").method == "none"
    phone = plan(rows(), deploy="phone with 2000 MB", model="auto")
    assert phone.export is not None
    assert phone.export.file_bytes < 1 << 30
    assert plan(rows(), text="voice assistant on an ESP32").method == "none"


def test_a_larger_model_on_fewer_rows_is_offered() -> None:
    """Where only the time of many rows made the model small, fewer rows are named, and the limit too."""
    made = plan(rows("chat", 2_000_000), hardware=RTX_3060, text="tone", model="auto")
    assert "fewer_rows" in {alternative.code for alternative in made.alternatives}
    slow = [c for c in made.candidates if c.verdict == "possible" and c.score > made.candidates[0].score]
    assert slow
    assert all("--max-hours" in " ".join(c.reasons) for c in slow if c.peak_bytes)


def test_asking_for_retrieval_or_no_training_is_heard() -> None:
    """Whoever asks for no training gets none, and the plan says that it was asked for."""
    for asked, method in (("rag", "none_rag"), ("none", "none")):
        made = plan(rows(), requested_method=asked)
        assert made.method == method
        assert not made.stages
        assert "asked for" in made.summary


def test_thumbs_never_become_dpo_even_when_asked() -> None:
    """Unpaired labels go to KTO and the reason says why."""
    made = plan(rows("unpaired_preference", positive_fraction=0.9), requested_method="dpo")
    assert chain(made) == ["kto"]
    assert made.verdict == "change_plan"
    assert {"unpaired_use_kto", "method_impossible"} <= codes(made)
    assert "not pairs" in rejected(made, "dpo")


def test_dpo_without_pairs_is_refused() -> None:
    """Demonstrations alone cannot be preferred."""
    made = plan(rows(), requested_method="dpo")
    assert chain(made) == ["sft"]
    assert made.verdict == "change_plan"


@pytest.mark.parametrize("objective", ["orpo", "simpo", "kto", "dpo"])
def test_a_preference_objective_that_the_data_allow_is_obeyed(objective: str) -> None:
    """ORPO and SimPO are not the first advice, but nothing forbids them on pairs."""
    made = plan(rows("preference", 6000), requested_method=objective)
    assert chain(made) == [objective]
    assert made.verdict == "train"


def test_a_base_model_learns_the_task_before_preferences() -> None:
    """Preferences shape what is there; a base model gets SFT on the better answers first."""
    assert chain(plan(rows("preference"), model="meta-llama/Llama-3.1-8B")) == ["sft", "dpo"]
    assert chain(plan(rows("preference"), model="meta-llama/Llama-3.1-8B", state="own_sft")) == ["dpo"]


def test_pairs_from_another_model_ask_for_sft_first() -> None:
    """Answers that the model would not give itself are brought into its reach first."""
    assert chain(plan(rows("preference", on_policy=False))) == ["sft", "dpo"]
    assert chain(plan(rows("preference", on_policy=True))) == ["dpo"]


@pytest.mark.parametrize(
    ("rate", "verdict", "objectives"), [(0.0, "change_plan", ["sft", "grpo"]), (0.3, "train", ["grpo"])]
)
def test_reinforcement_needs_some_success(rate: float, verdict: str, objectives: list[str]) -> None:
    """What never succeeds cannot be reinforced."""
    made = plan(rows("prompts_with_answers", baseline_pass_rate=rate), requested_method="grpo")
    assert (made.verdict, chain(made)) == (verdict, objectives)
    assert ("needs_nonzero_success" in codes(made)) == (rate == 0.0)


# --- not training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "verdict", "method"),
    [
        (5, "dont_train_yet", "none_prompting"),
        (30, "dont_train_yet", "none_prompting"),
        (60, "train", "lora"),
    ],
)
def test_few_rows_are_prompts_not_training_data(count: int, verdict: str, method: str) -> None:
    """Below ten and below fifty examples prompting comes first."""
    made = plan(rows(count=count))
    assert (made.verdict, made.method) == (verdict, method)
    assert "small_data_overfit" in codes(made)


def test_force_trains_on_few_rows_all_the_same() -> None:
    """Advice is advice: who insists gets a plan."""
    made = plan(rows(count=30), force=True)
    assert chain(made) == ["sft"]


@pytest.mark.parametrize(("size", "objectives"), [(9, []), (200, []), (2000, ["cpt"])])
def test_documents_are_retrieved_until_there_is_very_much_of_them(size: float, objectives: list[str]) -> None:
    """The volume table of the sources: retrieval, retrieval first, reading on."""
    made = plan({"kind": "documents", "size_mb": size}, hardware=A100, text="our field")
    assert chain(made) == objectives
    assert (made.method == "none_rag") == (not objectives)


def test_a_manner_is_learned_from_less_text_than_facts() -> None:
    """Twenty megabytes of an author teach a style."""
    assert chain(plan({"kind": "raw_text", "size_mb": 20}, text="write in the style of our author")) == [
        "cpt"
    ]


def test_facts_that_change_are_not_trained() -> None:
    """Prices of next week cannot be in the weights."""
    made = plan(rows("qa"), text="answer questions on prices that change weekly")
    assert (made.verdict, made.method) == ("dont_train_yet", "none_rag")
    assert {"rag_instead", "new_facts_hallucinate"} <= codes(made)


def test_prompts_without_answers_or_marks_are_no_training_data() -> None:
    """Unless a program marks the answers."""
    assert plan(rows("prompts")).method == "none_prompting"
    assert chain(plan(rows("prompts"), text="we have a reward function")) == ["grpo"]


def test_export_only() -> None:
    """Nothing to train, a file to make."""
    made = plan(text="convert to gguf", deploy="ollama", state="merged")
    assert (made.verdict, made.method) == ("export_only", "none")
    assert made.export is not None
    assert made.export.feasible


# --- tuners --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "model", "method"),
    [
        (RTX_4090, "Qwen/Qwen3-4B-Instruct-2507", "lora"),
        (RTX_4090, "Qwen/Qwen3-14B", "qlora"),
        (A100, "Qwen/Qwen3-14B", "lora"),
        (RTX_3060, "Qwen/Qwen3-8B", "qlora"),
    ],
)
def test_lora_where_it_fits_qlora_where_it_must(hardware: dict[str, object], model: str, method: str) -> None:
    """Sixteen bits are the better base while they fit."""
    assert plan(rows(), hardware=hardware, model=model).method == method


def test_a_rejected_method_says_its_bytes() -> None:
    """A reason about memory names what is needed and what is free."""
    made = plan(rows(), model="Qwen/Qwen3-14B")
    assert "GiB" in rejected(made, "lora")


def test_orthogonal_subspaces_are_for_what_must_be_kept() -> None:
    """Offered where something old must stay, on weights of 32 bits; elsewhere turned down, and full tuning
    that would forget names it."""
    old = rows(role="earlier_task")
    made = plan(rows(), old, model="Qwen/Qwen3-0.6B", requested_method="osf")
    assert (made.verdict, made.method) == ("train", "osf")
    assert made.stages[0].settings["weight_bits"] == 32
    assert made.stages[0].settings["preserved_share"] == 0.5
    alone = plan(rows(), model="Qwen/Qwen3-0.6B", requested_method="osf")
    assert alone.method != "osf"
    assert "must be kept" in next(c for c in alone.candidates if c.method == "osf").reasons[0]
    full = plan(rows(), old, model="Qwen/Qwen3-1.7B", requested_method="full")
    assert "osf" in next(c for c in full.candidates if c.method == "full").reasons[0]
    assert "another kind" in str(
        plan(rows(), old, model="openai-community/gpt2", requested_method="osf").candidates
    )


def test_a_pair_that_no_program_trains_says_why() -> None:
    """Every tuner with every objective is trained, or turned down with its reason even when insisted on."""
    for objective, facts in K.objectives.items():
        for tuner, about in K.tuners.items():
            program = K.programs[about.program or facts.program]
            offered = tuner in program.tuners and objective in program.objectives
            assert offered or about.elsewhere or tuner == "classifier_head", (objective, tuner)
    made = plan(rows("preference"), requested_method="ia3+dpo", force=True)
    assert made.method != "ia3"
    assert "at LoRA's" in next(c for c in made.candidates if c.method == "ia3").reasons[0]


def test_bitfit_needs_biases() -> None:
    """Llama has none; Qwen2.5 has some."""
    llama = plan(rows(), model="meta-llama/Llama-3.2-3B-Instruct", requested_method="bitfit")
    assert (llama.verdict, llama.method) == ("change_plan", "lora")
    assert "no_bias_terms" in codes(llama)
    qwen = plan(rows(), model="Qwen/Qwen2.5-1.5B-Instruct", requested_method="bitfit")
    assert (qwen.verdict, qwen.method) == ("train", "bitfit")


def test_force_cannot_do_the_impossible() -> None:
    """BitFit on a model without biases, which could not be loaded with some either, stays refused."""
    made = plan(rows(), model="Qwen/Qwen3-8B", requested_method="bitfit", force=True)
    assert made.method == "lora"
    added = plan(rows(), model="meta-llama/Llama-3.2-3B-Instruct", requested_method="bitfit", force=True)
    assert added.method == "bitfit"


def test_prompt_tuning_is_for_very_large_models() -> None:
    """On a small one it is answered with LoRA, on force done all the same."""
    small = plan(rows(), model="Qwen/Qwen2.5-0.5B-Instruct", requested_method="prompt_tuning")
    assert (small.verdict, small.method) == ("change_plan", "lora")
    assert "scale_effect" in codes(small)
    forced = plan(rows(), model="Qwen/Qwen2.5-0.5B-Instruct", requested_method="prompt_tuning", force=True)
    assert forced.method == "prompt_tuning"
    large = plan(rows(), model="Qwen/Qwen2.5-32B-Instruct", hardware=A100, requested_method="prompt_tuning")
    assert (large.verdict, large.method) == ("train", "prompt_tuning")


def test_what_cannot_become_a_gguf_is_not_trained_for_ollama() -> None:
    """Prefix tuning ends where llama.cpp begins."""
    made = plan(rows(), deploy="ollama", requested_method="prefix_tuning")
    assert made.method == "lora"
    assert "GGUF" in rejected(made, "prefix_tuning")


def test_storage_for_a_task_decides_between_adapters() -> None:
    """Two megabytes a task hold IA3 on 8B, not LoRA on every layer."""
    made = plan(rows(count=500, tasks=200), model=LLAMA_8B, hardware=A100, storage_per_task_kb=2000)
    assert made.method == "ia3"
    assert "kB" in rejected(made, "lora")


def test_storage_may_be_met_by_a_smaller_rank() -> None:
    """Where a small rank fits the storage, LoRA stays and its rank shrinks."""
    made = plan(rows(), model="Qwen/Qwen2.5-0.5B-Instruct", storage_per_task_kb=10000)
    assert made.method == "lora"
    assert made.stages[0].settings["lora_r"] in (1, 2, 4, 8)


def test_nothing_may_be_forgotten_rules_out_full_fine_tuning() -> None:
    """A request for it is answered with LoRA and the advice to mix in what must be kept."""
    made = plan(rows(count=12000), hardware=A100, must_not_forget=True, requested_method="full")
    assert (made.verdict, made.method) == ("change_plan", "lora")
    assert "replay_mix" in {warning.code for warning in made.warnings}
    assert "replay_fraction" not in made.stages[0].settings


def test_tenants_share_a_base() -> None:
    """Sixty tenants get sixty adapters of one rank."""
    made = plan(rows(tenants=60), hardware=A100, deploy="vLLM")
    assert made.method == "lora"
    assert made.stages[0].settings["same_rank_for_all"] is True
    assert "60 tenants" in rejected(made, "full")


@pytest.mark.parametrize(("classes", "method"), [(77, "classifier_head"), (3, "lora")])
def test_many_classes_get_a_head(classes: int, method: str) -> None:
    """A head picks one of many classes; a few can be written out."""
    made = plan(rows("classification", 13000, classes=classes), model="Qwen/Qwen3-1.7B")
    assert made.method == method


def test_a_classifier_head_needs_classes() -> None:
    """It is not for free text."""
    assert "class each" in rejected(plan(rows()), "classifier_head")


@pytest.mark.parametrize(("count", "method"), [(5000, "lora"), (900000, "full")])
def test_very_much_data_is_worth_full_fine_tuning(count: int, method: str) -> None:
    """Where adapters are known to fall behind and the memory is there."""
    made = plan(
        rows("chat", count), hardware=H100_8, model="meta-llama/Llama-3.1-8B", priorities=["max quality"]
    )
    assert made.method == method


# --- machines ------------------------------------------------------------------------------------


def test_apple_has_no_bitsandbytes() -> None:
    """QLoRA is ruled out there, and MLX named."""
    made = plan(rows(count=1500), hardware=M2, model="auto")
    assert made.method == "lora"
    assert {"no_bitsandbytes", "use_mlx"} <= codes(made)
    assert "bitsandbytes" in rejected(made, "qlora")


def test_turing_computes_in_fp16() -> None:
    """No bf16, no FlashAttention, a halved rate and strict clipping."""
    made = plan(rows(), hardware=T4, model="mistralai/Mistral-7B-Instruct-v0.3")
    settings = made.stages[0].settings
    assert settings["precision"] == "fp16"
    assert settings["learning_rate"] == 1e-4
    assert settings["max_grad_norm"] == 0.3
    assert {"no_bf16", "no_flash_attn"} <= codes(made)


def test_a_family_that_overflows_is_not_chosen_for_fp16() -> None:
    """Nothing of Gemma is chosen on a card without bf16; asked for, it computes in 32 bits."""
    free = plan(rows(), hardware=T4, model="auto")
    assert free.model is not None
    assert "gemma" not in free.model.id
    asked = plan(rows(), hardware=T4, model="google/gemma-3-1b-it")
    assert asked.stages[0].settings["precision"] == "fp32"
    assert "fp16_overflow_model" in codes(asked)


def test_without_an_accelerator_a_small_model_is_trained_slowly() -> None:
    """On a processor the choice is small and the warning says slow."""
    made = plan(rows(count=1000), hardware=CPU, model="auto")
    assert made.model is not None
    assert made.model.parameters < 3e9
    assert "slow" in codes(made)
    assert made.stages[0].settings["precision"] == "fp32"


def test_several_cards_share_what_one_cannot_hold() -> None:
    """Full fine-tuning of 8B on eight cards is sharded; LoRA is copied."""
    full = plan(rows("chat", 50000), hardware=H100_8, model=LLAMA_8B, requested_method="full")
    assert (full.method, full.parallel) == ("full", "fsdp")
    assert "multi_gpu_sharding" in codes(full)
    assert plan(rows(), hardware=H100_8, model=LLAMA_8B).parallel == "ddp"


def test_what_does_not_fit_is_answered_with_what_does() -> None:
    """Full fine-tuning of 70B on one card: QLoRA instead, and the figure."""
    made = plan(rows(), hardware=A100, model="meta-llama/Llama-3.3-70B-Instruct", requested_method="full")
    assert (made.verdict, made.method) == ("change_plan", "qlora")
    assert "does_not_fit" in codes(made)


def test_a_model_that_fits_nowhere_is_replaced_by_one_of_its_maker() -> None:
    """70B on 12 GB becomes the nearest Llama that fits."""
    made = plan(rows(), hardware=RTX_3060, model="meta-llama/Llama-3.3-70B-Instruct")
    assert made.verdict == "change_model"
    assert made.model is not None
    assert made.model.id.startswith("meta-llama/")


# --- models --------------------------------------------------------------------------------------


def test_a_licence_against_commerce_changes_the_model() -> None:
    """The substitute is of the same maker and near in size."""
    made = plan(rows(), hardware=RTX_3060, model="Qwen/Qwen2.5-3B-Instruct", commercial=True)
    assert made.verdict == "change_model"
    assert made.model is not None
    assert made.model.id.startswith("Qwen/")
    assert 1e9 < made.model.parameters < 9e9
    assert "licence" in codes(made)


def test_the_same_licence_is_only_named_otherwise() -> None:
    """Research use stays possible, with a warning."""
    made = plan(rows(), model="Qwen/Qwen2.5-3B-Instruct")
    assert made.verdict == "train"
    assert "licence" in codes(made)


def test_a_hosted_model_becomes_an_open_one() -> None:
    """And the plan says so."""
    made = plan(rows("chat"), model="ChatGPT")
    assert made.verdict == "change_model"
    assert made.model is not None
    assert "closed_weights" in codes(made)


def test_quantised_weights_become_the_original() -> None:
    """A GGUF cannot be trained."""
    made = plan(rows(), model="unsloth/Qwen3-8B-GGUF")
    assert made.model is not None
    assert made.model.id == "Qwen/Qwen3-8B"
    assert "use_unquantized_base" in codes(made)


def test_few_rows_start_from_the_instruct_twin() -> None:
    """A hundred rows do not teach a base model to follow instructions."""
    made = plan(rows(count=150), model="meta-llama/Llama-3.1-8B")
    assert made.verdict == "change_model"
    assert made.model is not None
    assert made.model.id == LLAMA_8B
    assert plan(rows(count=5000), model="meta-llama/Llama-3.1-8B").verdict == "train"


def test_the_device_that_will_run_it_limits_the_model() -> None:
    """A phone with 4 GB takes a file below half of that; a larger model is replaced."""
    free = plan(rows(), model="auto", deploy="android phone with 4 GB")
    assert free.export is not None
    assert free.export.file_bytes < 2 * GIB
    asked = plan(rows(), model=LLAMA_8B, deploy="android phone with 4 GB")
    assert asked.verdict == "change_model"


def test_languages_of_the_data_count() -> None:
    """A model that knows none of the languages loses against one that knows them."""
    made = plan(rows(languages=["th", "vi", "id"]), model="auto")
    assert made.model is not None
    assert {"th", "vi", "id"} <= set(K.models[made.model.id].languages)


def test_a_small_or_fast_wish_takes_a_smaller_model() -> None:
    """Small and low latency both stay below five billion parameters."""
    for wish in ("small", "low_latency"):
        made = plan(rows(), model="auto", priorities=[wish])
        assert made.model is not None
        assert made.model.parameters < 5e9


def test_hours_limit_the_free_choice_and_are_told_for_a_named_model() -> None:
    """Eight hours for sixty thousand rows on a 3060."""
    free = plan(rows(count=60000), hardware=RTX_3060, model="auto", max_hours=8)
    assert sum(stage.estimate.seconds.expected for stage in free.stages) < 8 * 3600
    named = plan(rows(count=60000), hardware=RTX_3060, model=LLAMA_8B, max_hours=8)
    assert named.verdict == "change_plan"
    assert "slow" in codes(named)
    assert "less_data" in {alternative.code for alternative in named.alternatives}


def test_training_for_weeks_is_not_advised_and_says_why() -> None:
    """Too long is called too long, not another way than asked; a free model is then the quickest."""
    named = plan(rows(count=300_000), hardware=CPU, model="Qwen/Qwen3-1.7B")
    assert named.verdict == "change_plan"
    assert named.summary.startswith("This takes too long as it stands: ")
    assert named.alternatives[0].code == "less_data"
    assert any(w.code == "slow" and w.severity == "must" for w in named.warnings)
    free = plan(rows(count=300_000), hardware=CPU, model="auto")
    assert free.model is not None
    assert named.model is not None
    assert free.model.parameters < named.model.parameters / 4


def test_an_unknown_model_without_a_size_is_an_error() -> None:
    """There is nothing to plan with."""
    with pytest.raises(UnknownNameError):
        plan(rows(), model="acme/road")


# --- figures -------------------------------------------------------------------------------------


def profile(**fields: object) -> DatasetProfile:
    """One declared dataset."""
    return msgspec.convert({"name": "d", "origin": "declared", "kind": "chat", **fields}, type=DatasetProfile)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rows": 100}, 100),
        ({"rows": 100, "tasks": 3}, 300),
        ({"task_rows": [10, 20]}, 30),
        ({"tasks": 4, "task_rows": [100, 300]}, 800),
    ],
)
def test_rows_of_tasks(fields: dict[str, object], expected: int) -> None:
    """Rows are counted over all tasks, whether listed, ranged or repeated."""
    assert rows_of((profile(**fields),)) == expected


def test_the_ratio_of_task_sizes() -> None:
    """Largest over smallest."""
    situation = read_situation(scenario(rows(tasks=2, task_rows=[500, 20000])), K)
    assert unequal_ratio(situation) == 40


@pytest.mark.parametrize(
    ("fields", "target", "least"),
    [
        ({"mean_tokens": 400}, 1024, 512),
        ({"p95_tokens": 900}, 1280, 1024),
        ({"p95_tokens": 900, "max_tokens": 1500}, 1536, 1024),
        ({"p95_tokens": 900, "max_tokens": 90000}, 1536, 1024),
        ({"mean_tokens": 20}, 256, 256),
    ],
)
def test_sequence_lengths(fields: dict[str, object], target: int, least: int) -> None:
    """The length holds nearly every row, outliers apart, in whole steps."""
    lengths = lengths_of((profile(**fields),), K.rules["data"]["lengths"])
    assert (lengths.target, lengths.least) == (target, least)


@pytest.mark.parametrize(("count", "epochs"), [(500, 3), (5000, 2), (50000, 2), (500000, 1)])
def test_epochs_fall_with_rows(count: int, epochs: int) -> None:
    """Few rows are read more often than many."""
    situation = read_situation(scenario(rows(count=count)), K)
    assert situation.spec is not None
    proposal = Proposal(spec=situation.spec, tuner="lora", facts=K.tuners["lora"], chain=("sft",))
    assert epochs_for("sft", proposal, situation, K)[0] == epochs


def test_data_beyond_an_adapter() -> None:
    """A hundred thousand rows are the edge that the sources name."""
    assert data_excess(read_situation(scenario(rows(count=100000)), K), K) == pytest.approx(0)
    assert data_excess(read_situation(scenario(), K), K) == -9


def test_candidates_come_best_first_and_keep_the_rejected() -> None:
    """One is chosen, all others follow, each with a reason."""
    found = recommend(scenario(rows()), K)
    assert [c.verdict for c in found].count("chosen") == 1
    assert found[0].verdict == "chosen"
    assert {c.method for c in found} >= {"full", "lora", "qlora", "ia3", "bitfit", "dpo", "grpo", "cpt"}
    assert all(c.reasons for c in found)


def test_the_free_choice_estimates_only_what_it_needs() -> None:
    """With some hundred combinations most are ranked without an estimate."""
    advice = advise(scenario(rows(), model="auto"), K)
    estimated = [o for o in advice.options if o.fit or (o.no_fit and not o.no_fit.rough)]
    assert len(estimated) < len(advice.options) / 4


def test_much_text_is_read_by_a_base_model() -> None:
    """Reading on starts from a base model where the choice is free, from the named one where it is not."""
    text = {"kind": "raw_text", "size_mb": 2000}
    free = plan(text, rows(), model="auto", hardware=A100)
    assert free.model is not None
    assert not K.models[free.model.id].instruct
    named = plan(text, model=LLAMA_8B, hardware=A100)
    assert named.model is not None
    assert named.model.id == LLAMA_8B


def test_a_free_choice_never_needs_a_quantisation_with_visible_loss() -> None:
    """Rather a smaller model; for a named one the loss is told."""
    free = plan(rows(), model="auto", deploy="a laptop with 8GB, ollama")
    assert free.export is not None
    assert "quality_loss_low_bit" not in codes(free)
    named = plan(rows(), model="Qwen/Qwen3-8B", deploy="a laptop with 8GB, ollama")
    assert named.export is not None
    assert named.export.quant == "Q3_K_M"
    assert "quality_loss_low_bit" in codes(named)


def test_a_wish_beyond_text_is_not_trained() -> None:
    """Whatever the rows, a model of text does not learn to see; --force trains all the same."""
    made = plan(rows(), text="recognise defects in photos")
    assert (made.verdict, made.method, made.export) == ("dont_train_yet", "none", None)
    assert "out_of_scope" in codes(made)
    assert plan(rows(), text="recognise defects in photos", force=True).stages


@pytest.mark.parametrize(
    "text", ["classify the latest news", "summarise breaking news", "translate prices that change daily"]
)
def test_what_stands_in_the_request_may_change(text: str) -> None:
    """Changing facts speak against training only where the model would have to know them."""
    assert plan(rows(), text=text).verdict == "train"


def test_training_for_weeks_is_not_advised() -> None:
    """Eight billion parameters on a processor: possible, but another plan is better."""
    hardware = {"accelerator": "none", "ram_gib": 64, "cpu_cores": 4}
    assert plan(rows(), hardware=hardware, model="Qwen/Qwen3-8B").verdict == "change_plan"


def test_a_stand_in_is_one_that_needs_no_cuts() -> None:
    """Where the model asked for does not fit, the next one fits with whole rows and rank."""
    made = plan(rows(), hardware={"accelerator": "RTX 3070"}, model="Qwen/Qwen3-8B")
    assert made.verdict == "change_model"
    assert "truncation" not in codes(made)
    assert made.stages[0].settings["lora_r"] == 16


@pytest.mark.parametrize(
    ("hardware", "model", "wish", "least"),
    [
        ("RTX 4090", "meta-llama/Llama-3.3-70B-Instruct", {}, 40),
        ("RTX 4090", "meta-llama/Llama-3.1-8B-Instruct", {"requested_method": "full"}, 40),
    ],
)
def test_the_memory_that_a_refused_wish_needs(
    hardware: str, model: str, wish: dict[str, str], least: float
) -> None:
    """A refused model or method is answered with the memory that makes it possible, not its weights alone."""
    made = plan(rows(), hardware={"accelerator": hardware}, model=model, **wish)
    told = next(a.message for a in made.alternatives if a.code == "more_memory")
    assert model in told
    assert float(told.split()[1]) > least


def test_what_exceeds_the_device_is_never_possible() -> None:
    """A combination whose weights alone are too large is rejected without an estimate."""
    made = plan(rows(), hardware={"accelerator": "RTX 3070"}, model="auto")
    large = {c.verdict for c in made.candidates if "32B" in c.model and c.method in ("lora", "full")}
    assert large == {"rejected"}


def test_devices_share_a_model_rather_than_cut_its_rows() -> None:
    """Where one device would need shorter rows, the weights are spread over several."""
    made = plan(
        rows(), hardware={"accelerator": "B200", "count": 8}, model="meta-llama/Llama-3.3-70B-Instruct"
    )
    assert (made.method, made.parallel) == ("lora", "fsdp")
