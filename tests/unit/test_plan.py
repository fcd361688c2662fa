"""Plans: every setting explained, overrides obeyed, warnings with remedies, the same bytes each time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from advisor.cli.planning import require_trainable
from advisor.errors import KnowledgeError, RefusedError, UnknownNameError, UsageError
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.plan.warn import CHECKS
from advisor.recommend.reasons import because
from advisor.scenario import spec_for
from advisor.storage import encode_json
from advisor.types import Plan
from cases import A100, CPU, LLAMA_8B, RTX_3060, RTX_4090, T4, chain, codes, plan, rows, scenario

K = load()
SFT_KEYS = {
    "learning_rate", "epochs", "max_steps", "micro_batch", "effective_batch", "max_seq_len", "warmup_ratio",
    "scheduler", "weight_decay", "max_grad_norm", "optimizer", "precision", "weight_bits",
    "gradient_checkpointing", "packing", "attention", "loss", "loss_on", "heldout_fraction",
    "save_every_steps", "keep_checkpoints", "report_to",
}  # fmt: skip
LORA_KEYS = {"lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target"}


@pytest.mark.parametrize(
    ("method", "more"),
    [("full", set()), ("lora", LORA_KEYS), ("qlora", LORA_KEYS | {"double_quant"})],
)
def test_sft_settings_are_complete_and_explained(method: str, more: set[str]) -> None:
    """The training program's keys are all there, and each has a reason with an existing source."""
    made = plan(rows(), model="Qwen/Qwen3-0.6B", requested_method=method)
    stage = made.stages[0]
    assert made.method == method
    assert set(stage.settings) == SFT_KEYS | more
    assert set(stage.why) == set(stage.settings)
    assert all(why.source in K.sources and why.reason for why in stage.why.values())


@pytest.mark.parametrize(
    ("model", "method", "rate"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "full", 1e-3),
        ("Qwen/Qwen3-4B-Instruct-2507", "full", 2e-5),
        (LLAMA_8B, "full", 1e-5),
        (LLAMA_8B, "lora", 2e-4),
        ("Qwen/Qwen3-14B", "lora", 1e-4),
    ],
)
def test_learning_rate_by_size_and_tuner(model: str, method: str, rate: float) -> None:
    """Large models take less; LoRA takes ten times the full rate."""
    made = plan(rows(), hardware=A100, model=model, requested_method=method)
    assert made.stages[0].settings["learning_rate"] == rate


def test_a_tiny_model_takes_a_high_rate() -> None:
    """Below fifty million parameters the rule of size says 3e-3 for LoRA and 1e-3 for all weights."""
    like = spec_for("HuggingFaceTB/SmolLM2-135M-Instruct", K)
    assert like is not None
    shape = msgspec.structs.replace(like.shape, layers=4, hidden=256, intermediate=512, vocab=2048)
    tiny = msgspec.structs.replace(like, id="starter", shape=shape, parameters=3_700_000)
    case = msgspec.structs.replace(scenario(rows("chat", 220), hardware=CPU), spec=tiny, model="starter")
    free = make_plan(case, K)
    assert free.method == "full"
    assert free.stages[0].settings["learning_rate"] == 1e-3
    asked = msgspec.structs.replace(case, goal=msgspec.structs.replace(case.goal, requested_method="lora"))
    assert make_plan(asked, K).stages[0].settings["learning_rate"] == 3e-3


def test_thumbs_are_weighted() -> None:
    """92 to 8 gives the rarer side 11.5 times the weight, and batches hold several rows."""
    settings = (
        plan(rows("unpaired_preference", 20000, positive_fraction=0.92), model=LLAMA_8B).stages[0].settings
    )
    assert settings["undesirable_over_desirable_weight"] == 11.5
    assert settings["per_step_batch"] == settings["micro_batch"]
    assert isinstance(settings["micro_batch"], int)
    assert settings["micro_batch"] >= 2


def test_similar_pairs_get_a_share_of_sft_loss() -> None:
    """And a stronger tie to the start."""
    made = plan(rows("preference", pair_similarity=0.93))
    settings = made.stages[0].settings
    assert settings["sft_loss_weight"] == 0.2
    assert settings["beta"] == 0.2
    assert "likelihood_displacement" in codes(made)


def test_unequal_tasks_are_capped() -> None:
    """FLAN's cap where tasks differ much, a temperature in any case."""
    unequal = plan(rows(tasks=2, task_rows=[500, 20000]), hardware=A100)
    assert unequal.task_kind == "multi_task"
    assert unequal.stages[0].settings["mixing_cap"] == 3000
    equal = plan(rows(count=500, tasks=20), hardware=A100)
    assert "mixing_cap" not in equal.stages[0].settings
    assert equal.stages[0].settings["mixing_temperature"] == 2.0


def test_earlier_tasks_are_replayed() -> None:
    """A quarter of the rows comes from the old dataset, with a gentler rate."""
    made = plan(rows(), rows(count=9000, name="old", role="earlier_task"))
    stage = made.stages[0]
    assert made.task_kind == "continual"
    assert stage.settings["replay_fraction"] == 0.25
    assert "old" in stage.datasets
    told = {
        warning.code: warning for warning in made.warnings if warning.code in ("forgetting", "replay_mix")
    }
    assert all(warning.handled for warning in told.values())
    assert "25% of the training rows" in told["replay_mix"].message
    assert "old is rehearsed" in told["forgetting"].message


@pytest.mark.parametrize(
    ("old", "settings", "words"),
    [
        (rows(count=100, name="old", role="earlier_task"), {}, "10% of the training rows, which is all"),
        (rows(count=900, name="old", role="earlier_task"), {"replay_fraction": 0.0}, "would be forgotten."),
        (
            {"kind": "preference", "rows": 900, "name": "old", "role": "earlier_task"},
            {},
            "old cannot be mixed",
        ),
    ],
)
def test_earlier_data_that_is_not_mixed_in_enough_is_asked_for(
    old: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    """Too few rows, none by the person's own setting, or rows without answers to rehearse."""
    made = plan(rows(count=900), old, overrides=settings)
    told = next(warning for warning in made.warnings if warning.code == "replay_mix")
    assert words in told.message
    assert not told.handled
    assert ("old" in made.stages[0].datasets) is (old["kind"] != "preference")


def test_a_head_over_classes_mixes_nothing() -> None:
    """It reads one set of labelled texts: neither old answers nor other tasks go into it, which is told."""
    made = plan(
        rows("classification", classes=2), rows("classification", classes=2, name="b"),
        rows(name="old", role="earlier_task"), requested_method="classifier_head", hardware=A100,
    )  # fmt: skip
    assert made.method == "classifier_head"
    assert not {"replay_fraction", "mixing_temperature", "mixing_cap"} & made.stages[0].settings.keys()
    told = next(warning for warning in made.warnings if warning.code == "replay_mix")
    assert "old cannot be mixed" in told.message


@pytest.mark.parametrize(("count", "method", "passes"), [(100, "osf", 6), (300, "osf", 4), (300, "lora", 2)])
def test_subspaces_take_more_passes_beside_old_rows(count: int, method: str, passes: int) -> None:
    """They disturb the old less and learn the new more slowly; other methods are kept to few passes."""
    old = rows(name="old", role="earlier_task")
    made = plan(rows(count=count), old, model="Qwen/Qwen3-0.6B", requested_method=method, hardware=A100)
    assert made.method == method
    assert made.stages[0].settings["epochs"] == passes


def test_few_rows_make_small_batches() -> None:
    """A batch in memory is no larger than the batch that few rows want, so that there are steps enough."""
    made = plan(rows(count=300, mean_tokens=30), model="HuggingFaceTB/SmolLM2-135M-Instruct", hardware=CPU)
    assert made.stages[0].settings["effective_batch"] == 8


def test_a_mixture_is_not_packed() -> None:
    """On a processor short rows are packed by their length, which would part the tasks from each other."""
    short = {"count": 5000, "mean_tokens": 20, "p95_tokens": 40}
    alone, old = rows(**short), rows(**short, name="old", role="earlier_task")
    packed = [
        plan(*data, hardware=CPU, model="HuggingFaceTB/SmolLM2-135M-Instruct").stages[0].settings["packing"]
        for data in ((alone,), (alone, old))
    ]
    assert packed == [True, False]


def test_a_new_language_is_warned_about() -> None:
    """Its words need vectors of their own, which is told; old text is mixed in only where there is some."""
    text = {"kind": "raw_text", "size_mb": 2000, "languages": ["rw"]}
    made = plan(text, model="auto", text="speak Kinyarwanda")
    settings = made.stages[0].settings
    assert chain(made) == ["cpt"]
    assert settings["loss_on"] == "all"
    assert "replay_fraction" not in settings
    assert {"tokenizer_fertility", "train_embeddings", "replay_mix"} <= codes(made)
    old = {"kind": "raw_text", "size_mb": 200, "name": "old", "role": "earlier_task"}
    again = plan(text, old, model="auto", text="speak Kinyarwanda").stages[0]
    assert again.settings["replay_fraction"] == 0.25
    assert again.datasets[-1] == "old"


@pytest.mark.parametrize(
    ("change", "code", "verdict"),
    [
        ({"duplicate_fraction": 0.35}, "dedupe", "fix_data_first"),
        ({"duplicate_fraction": 0.05}, "dedupe", "train"),
        ({"mixed_templates": True}, "chat_template", "fix_data_first"),
        ({"holdout_rows": 0}, "no_holdout", "train"),
    ],
)
def test_flaws_of_the_data(change: dict[str, object], code: str, verdict: str) -> None:
    """Large flaws come before training, small ones are named."""
    made = plan(rows("chat", **change))
    assert code in codes(made)
    assert made.verdict == verdict
    assert chain(made) == ["sft"]


def test_rows_set_aside_settle_the_warning_about_them() -> None:
    """Who has no held-out rows is told that the plan sets some aside; where it does not, the risk is open."""
    found = {w.code: w.handled for w in plan(rows("chat", holdout_rows=0)).warnings}
    assert found["no_holdout"] is True
    without = plan(rows("chat", holdout_rows=0), overrides={"heldout_fraction": 0.0})
    assert {w.code: w.handled for w in without.warnings}["no_holdout"] is False


def test_minutes_on_a_processor_are_not_called_slow() -> None:
    """A tiny model on few rows is done before the warning could be read."""
    few = plan(rows(count=50), hardware=CPU, model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert few.stages
    assert "slow" not in codes(few)


def test_tool_calls_need_their_tools() -> None:
    """Rows that call tools nobody described teach calling blindly."""
    made = plan(rows("tool_calling", has_tools_column=False))
    assert made.verdict == "fix_data_first"
    assert "tools_column" in codes(made)
    assert plan(rows("tool_calling", has_tools_column=True)).verdict == "train"


@pytest.mark.parametrize(
    ("model", "kind", "severity"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "instruction", "must"),
        ("Qwen/Qwen3-8B", "instruction", "should"),
        ("Qwen/Qwen3-4B-Instruct-2507", "instruction", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "reasoning_chat", None),
    ],
)
def test_reasoning_models_need_reasoning_data(model: str, kind: str, severity: str | None) -> None:
    """A model that thinks aloud unlearns it from answers without thoughts."""
    found = {w.code: w.severity for w in plan(rows(kind), model=model, hardware=A100).warnings}
    assert found.get("keep_reasoning_data") == severity


def test_rows_longer_than_the_limit_are_told() -> None:
    """When only a shorter length fits, the plan says which rows suffer and asks to change it."""
    made = plan(rows(count=800, mean_tokens=20000, p95_tokens=32000), model=LLAMA_8B, context_tokens=32768)
    assert {"truncation", "long_context_memory"} <= codes(made)


# --- overrides -----------------------------------------------------------------------------------


def test_an_override_is_obeyed_and_told() -> None:
    """The value is the person's, the reason names the advice."""
    made = plan(rows(), overrides={"learning_rate": 1e-4, "max_steps": 20})
    stage = made.stages[0]
    assert stage.settings["learning_rate"] == 1e-4
    assert "set by you; the advice was 0.0002" in stage.why["learning_rate"].reason
    assert "override_out_of_range" not in codes(made)
    assert stage.estimate.seconds.expected < plan(rows()).stages[0].estimate.seconds.expected


def test_an_override_outside_the_sources_is_warned_about() -> None:
    """And still obeyed."""
    made = plan(rows(), overrides={"learning_rate": 0.05})
    assert made.stages[0].settings["learning_rate"] == 0.05
    assert "override_out_of_range" in codes(made)


def test_an_override_changes_the_estimate() -> None:
    """A larger batch needs more; too large a one is told."""
    usual = plan(rows()).stages[0].estimate.peak_bytes.high
    made = plan(rows(), overrides={"micro_batch": 64, "effective_batch": 64})
    assert made.stages[0].estimate.peak_bytes.high > usual
    assert "does_not_fit" in codes(made)


def test_an_override_may_name_its_stage() -> None:
    """`dpo.learning_rate` leaves the SFT stage alone."""
    made = plan(rows("chat"), rows("preference"), overrides={"dpo.learning_rate": 1e-6})
    assert made.stages[0].settings["learning_rate"] == 2e-4
    assert made.stages[1].settings["learning_rate"] == 1e-6


@pytest.mark.parametrize(
    ("overrides", "error", "named"),
    [
        ({"learning_rat": 1e-4}, UnknownNameError, "learning_rate"),
        ({"dpo.beta": 0.2}, UnknownNameError, "sft"),
        ({"learning_rate": "fast"}, UsageError, "learning_rate"),
        ({"packing": 1}, UsageError, "packing"),
        ({"micro_batch": -2}, UsageError, "micro_batch"),
        ({"micro_batch": 1.5}, UsageError, "micro_batch"),
        ({"precision": "bf15"}, UsageError, "bf15"),
        ({"learning_rate": float("nan")}, UsageError, "learning_rate"),
    ],
)
def test_a_wrong_override_is_a_usage_error(
    overrides: dict[str, object], error: type[UsageError], named: str
) -> None:
    """Unknown names and wrong kinds are refused with the valid ones."""
    with pytest.raises(error) as caught:
        plan(rows(), overrides=overrides)
    assert named in caught.value.message


def test_a_setting_of_an_objective_that_was_not_taken_says_so() -> None:
    """Not that its name is unknown alone, but why the objective that has it is not part of the plan."""
    with pytest.raises(UsageError, match="reward_file") as caught:
        plan(rows(), requested_method="grpo", overrides={"reward_file": "own.py"})
    assert "grpo was not taken: it needs prompts" in caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "method", "setting", "value"),
    [
        ("preference", "lora+dpo", "dpo_loss", "ipo"),
        ("preference", "lora+dpo", "label_smoothing", 0.1),
        ("prompts_with_answers", "lora+grpo", "reward_functions", ["checks", "length"]),
        ("prompts_with_answers", "lora+grpo", "reward_file", "own.py"),
        ("prompts_with_answers", "lora+grpo", "reward_pattern", "^42$"),
        ("instruction", "lora", "lora_init", "pissa"),
        ("instruction", "prompt_tuning", "init_text", "Speak like a pirate."),
        ("instruction", "adapter", "bottleneck_style", "pfeiffer"),
        ("instruction", "adapter", "bottleneck", 8),
    ],
)
def test_every_key_of_a_program_can_be_set(kind: str, method: str, setting: str, value: object) -> None:
    """Also one of which the advice says nothing."""
    made = plan(
        rows(kind), requested_method=method, force=True, overrides={setting: value},
        model="Qwen/Qwen2.5-0.5B-Instruct",
    )  # fmt: skip
    assert made.stages[-1].settings[setting] == value
    assert "set by you" in made.stages[-1].why[setting].reason


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"virtual_tokens": 8}, "virtual_tokens"),
        ({"cpu_offload": True}, "cpu_offload"),
        ({"lora_init": "pizza"}, "pissa"),
        ({"scheduler": "banana"}, "cosine"),
        ({"warmup_ratio": 3.0}, "between"),
        ({"micro_batch": 3, "effective_batch": 8}, "not a multiple"),
    ],
)
def test_what_the_program_would_not_read_is_refused(overrides: dict[str, object], named: str) -> None:
    """A setting of another tuner, an unknown choice, a value out of range, two that do not go together."""
    with pytest.raises(UsageError) as caught:
        plan(rows(), overrides=overrides)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("method", "overrides", "named"),
    [
        ("prompt_tuning", {"packing": True}, "packing"),
        ("p_tuning", {"packing": True}, "packing"),
        ("prefix_tuning", {"packing": True}, "packing"),
        ("classifier_head", {"packing": True}, "packing"),
        ("prefix_tuning", {"gradient_checkpointing": True}, "cache"),
        ("ia3", {"weight_bits": 4}, "unquantised"),
        ("lora", {"weight_bits": 4}, "QLoRA"),
        ("qlora", {"weight_bits": 16}, "QLoRA"),
    ],
)
def test_what_would_be_silently_wrong_is_never_planned(
    method: str, overrides: dict[str, object], named: str
) -> None:
    """Refused with the reason and another way, and not what the plan chooses by itself."""
    data = rows("classification", classes=90) if method == "classifier_head" else rows()
    options: dict[str, Any] = {
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "requested_method": method,
        "force": True,
    }
    free = plan(data, **options)
    assert free.method == method
    assert all(free.stages[0].settings.get(name) != value for name, value in overrides.items())
    with pytest.raises(RefusedError, match=named) as caught:
        plan(data, overrides=overrides, **options)
    assert "--method" in caught.value.remedy


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "reward"])
def test_preferences_without_pairs_are_refused(objective: str) -> None:
    """The reason names what is missing; what the data allow is planned in its place, and not run unasked."""
    case = scenario(rows(), requested_method=objective)
    made = make_plan(case, K)
    assert made.verdict == "change_plan"
    assert [stage.objective for stage in made.stages] == ["sft"]
    turned_down = next(one for one in made.candidates if one.method == objective)
    assert "pairs of a better and a worse answer" in turned_down.reasons[0]
    with pytest.raises(RefusedError) as caught:
        require_trainable(made, case)
    assert caught.value.remedy


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_reinforcement_without_a_reward_is_refused(objective: str) -> None:
    """Prompts alone do not say what a good answer is; a reward that is named does."""
    goal = {"text": "a reward function marks the answers", "requested_method": objective, "force": True}
    case = scenario(rows("prompts"), **goal)
    with pytest.raises(RefusedError, match="how good an answer is") as caught:
        require_trainable(make_plan(case, K), case)
    assert caught.value.code == "no_reward"
    assert "reward_functions" in caught.value.remedy
    named = scenario(rows("prompts"), overrides={"reward_functions": ["length"]}, **goal)
    require_trainable(make_plan(named, K), named)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "ia3", "p_tuning"])
def test_a_rate_of_lora_is_warned_about_where_few_weights_learn(method: str) -> None:
    """Soft prompts and IA3 learn next to nothing at it, without an error; the plan's own rate is another."""
    options: dict[str, Any] = {
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "requested_method": method,
        "force": True,
    }
    assert "override_out_of_range" not in codes(plan(rows(), **options))
    rate = 5e-5 if method == "p_tuning" else 1e-5 if method == "prefix_tuning" else 1e-4
    made = plan(rows(), overrides={"learning_rate": rate}, **options)
    assert made.stages[0].settings["learning_rate"] == rate
    told = next(one.message for one in made.warnings if one.code == "override_out_of_range")
    assert "next to nothing" in told


def test_the_batches_move_together() -> None:
    """KTO's estimate of the drift is made from the batch in memory; a step is made of whole batches."""
    thumbs = rows("unpaired_preference")
    settings = plan(thumbs, overrides={"micro_batch": 6}).stages[0].settings
    assert settings["per_step_batch"] == settings["micro_batch"] == 6
    assert int(str(settings["effective_batch"])) % 6 == 0
    settings = plan(rows(), overrides={"effective_batch": 9}).stages[0].settings
    assert 9 % int(str(settings["micro_batch"])) == 0
    answered = rows("prompts_with_answers")
    made = plan(answered, requested_method="lora+grpo", force=True, overrides={"num_generations": 6})
    assert int(str(made.stages[-1].settings["effective_batch"])) % 6 == 0


def test_packing_by_hand_keeps_one_sequence_in_memory() -> None:
    """Asked for alone, it moves the batch, so that the run is not refused; with a batch of more it is
    refused here."""
    stage = plan(rows(), overrides={"packing": True}).stages[0]
    assert (stage.settings["packing"], stage.settings["micro_batch"]) == (True, 1)
    plain = plan(rows(), overrides={"micro_batch": 1}).stages[0]
    assert stage.estimate.peak_bytes.high < 1.2 * plain.estimate.peak_bytes.high
    with pytest.raises(UsageError, match="square of its length"):
        plan(rows(), overrides={"packing": True, "micro_batch": 4})


# --- the whole -----------------------------------------------------------------------------------


def test_export_follows_the_wish() -> None:
    """Small models get more bits; an adapter that was asked for stays a file of its own."""
    small = plan(rows(), model="Qwen/Qwen3-1.7B", deploy="ollama")
    assert small.export is not None
    assert (small.export.quant, small.export.route) == ("Q5_K_M", "merged")
    own = plan(rows(), deploy="ollama", priorities=["adapter"])
    assert own.export is not None
    assert (own.export.quant, own.export.route) == ("Q4_K_M", "lora_gguf")
    assert "merge_before_gguf" in codes(own)


def test_a_forced_prefix_is_a_file_beside_the_model() -> None:
    """It is trained on insistence; the plan says that Ollama cannot load it, and what can."""
    made = plan(rows(), deploy="ollama", requested_method="prefix_tuning", force=True)
    assert made.method == "prefix_tuning"
    assert made.export is not None
    assert not made.export.feasible
    assert "cannot_export" in codes(made)
    made = plan(rows(), deploy="a laptop", requested_method="prefix_tuning", force=True)
    assert made.export is not None
    assert (made.export.feasible, made.export.route) == (True, "prefix_state")
    assert "llama-cpp-python" in made.export.reason


def test_nothing_fits_at_all() -> None:
    """A machine too small for anything gets no stages, a reason and the memory that would help."""
    tiny = {
        "accelerator": "Old",
        "vendor": "nvidia",
        "memory_gib": 0.5,
        "compute_capability": "6.1",
        "bf16": False,
    }
    made = plan(rows(), hardware=tiny, model="auto")
    assert (made.method, made.stages, made.verdict) == ("none", (), "change_plan")
    assert "does_not_fit" in codes(made)
    assert "more_memory" in {alternative.code for alternative in made.alternatives}


def test_no_data_at_all() -> None:
    """Without data there is nothing to train, and it says so."""
    made = plan()
    assert (made.verdict, made.stages) == ("dont_train_yet", ())
    assert made.summary


def test_the_plan_round_trips() -> None:
    """What is written as JSON decodes to the same plan."""
    made = plan(rows("chat"), rows("preference"))
    assert msgspec.json.decode(encode_json(made), type=Plan) == made


def test_the_summary_is_plain_and_whole() -> None:
    """Method, model, memory, time and file in one paragraph."""
    text = plan(rows(), deploy="ollama").summary
    for part in ("LoRA", "SFT", "Qwen/Qwen3-8B", "GiB", "GGUF"):
        assert part in text


def test_what_was_assumed_is_said() -> None:
    """How the goal was understood and what was left open."""
    text = " ".join(plan(rows(), text="brand tone").assumptions)
    assert "style (from" in text
    assert "Where the model must run was not said" in text


def test_every_warning_of_the_planner_is_in_the_knowledge_base() -> None:
    """Each check has its text, and each text is reachable."""
    assert {code for code, _ in CHECKS} == set(K.warnings)


def test_a_sentence_with_a_figure_too_many_names_the_file() -> None:
    """A placeholder that no case fills is a mistake in kb/."""
    with pytest.raises(KnowledgeError) as caught:
        because(K, "setting", "lora_alpha")
    assert "reasons.toml" in caught.value.message


@pytest.mark.parametrize("hardware", [RTX_3060, RTX_4090, A100, T4, CPU])
def test_warnings_come_musts_first(hardware: dict[str, object]) -> None:
    """Nobody has to search for what matters."""
    severities = [w.severity for w in plan(rows(count=200), hardware=hardware, model="auto").warnings]
    assert severities == sorted(severities)


def test_tokenizer_that_llama_cpp_cannot_follow_is_told_before_training() -> None:
    """For Ollama another model is advised; for a server the same model is trained without a word."""
    told = "The tokenizer is Unigram; BPE can be exported here."
    for deploy, verdict in (("ollama", "change_model"), ("vLLM server", "train")):
        given = scenario(rows(), deploy=deploy)
        spec = msgspec.structs.replace(spec_for("Qwen/Qwen3-8B", load()), gguf_obstacle=told)
        made = make_plan(msgspec.structs.replace(given, spec=spec), load())
        assert made.verdict == verdict
        assert ("tokenizer_without_gguf" in codes(made)) == (deploy == "ollama")
        assert made.export is not None
        if deploy == "ollama":
            assert not made.export.feasible
            assert "Unigram" in made.export.reason
        else:
            assert (made.export.format, made.export.feasible) == ("safetensors", True)


def test_a_model_without_sdpa_is_not_planned_with_it() -> None:
    """Gemma 2 caps its attention logits; transformers refuses to load it with SDPA."""
    assert plan(rows(), model="google/gemma-2-2b-it").stages[0].settings["attention"] == "eager"
    assert plan(rows(), model="google/gemma-3-4b-it").stages[0].settings["attention"] == "sdpa"


def test_a_server_gets_what_servers_load() -> None:
    """vLLM loads merged weights, or one adapter for each tenant beside the base; nobody asked for a GGUF."""
    merged = plan(rows(), deploy="vLLM server").export
    assert merged is not None
    assert (merged.format, merged.route) == ("safetensors", "merged")
    apart = plan(rows(tenants=60), deploy="vLLM server").export
    assert apart is not None
    assert (apart.format, apart.route) == ("safetensors", "adapter")
    local = plan(rows(), deploy="llama.cpp on a server").export
    assert local is not None
    assert local.format == "gguf"
