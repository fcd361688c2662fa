"""All records that flow between the stages, and those of kb/; what each field means and in which unit.

Goes in: nothing. Comes out: frozen, keyword-only structs that encode to JSON and refuse unknown fields.
Never does: I/O, computation, defaults that hide a fact about the world.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Origin = Literal["probed", "declared", "assumed"]
Severity = Literal["info", "warning", "error"]
DataKind = Literal[
    "instruction", "chat", "prompt_completion", "preference", "unpaired_preference", "raw_text",
    "documents", "qa", "classification", "tool_calling", "reasoning_chat", "prompts",
    "prompts_with_answers",
]  # fmt: skip
Objective = Literal["cpt", "sft", "dpo", "kto", "orpo", "simpo", "reward", "rloo", "grpo"]
Verdict = Literal["train", "dont_train_yet", "fix_data_first", "change_plan", "change_model", "export_only"]
Parallel = Literal["none", "ddp", "fsdp", "zero3"]
CheckName = Literal[
    "token_ids",
    "logits",
    "arithmetic",
    "greedy_text",
    "chat_template",
    "special_tokens",
    "metadata",
    "tensors",
    "prefix",
    "four_bit_base",
]
Value = str | int | float | bool | list[str] | dict[str, float] | None
"""What a setting may hold in a plan, a recipe and `--set`."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: immutable, named fields only, unknown fields refused on decoding."""


class Band(Record, frozen=True, kw_only=True):
    """A quantity with its uncertainty; the plan decides on `high`. Bytes are ints, seconds floats."""

    low: int | float
    expected: int | float
    high: int | float


class Finding(Record, frozen=True, kw_only=True):
    """Something noticed about the machine or the data, with what to do about it."""

    code: str
    severity: Severity
    message: str
    count: int = 1
    examples: tuple[str, ...] = ()
    """Where it was seen, for data `row 17` or `file.jsonl line 17`, at most five."""
    remedy: str = ""


# --- the machine ---------------------------------------------------------------------------------


class Accelerator(Record, frozen=True, kw_only=True):
    """One kind of accelerator; `count` says how many of it the machine has."""

    name: str
    vendor: Literal["nvidia", "amd", "apple", "intel"]
    memory_bytes: int
    """Total memory of one device."""
    free_bytes: int
    """Free memory of the fullest device now; equals `memory_bytes` when declared."""
    compute_capability: str | None = None
    supports_bf16: bool = True
    count: int = 1
    kb_id: str | None = None
    """Key of the kb/hardware entry, when the name is known there."""
    driver: str | None = None
    mig: bool = False


class Volume(Record, frozen=True, kw_only=True):
    """Free space of the file system behind a path."""

    role: Literal["output", "cache"]
    path: str
    free_bytes: int


class MatrixBench(Record, frozen=True, kw_only=True):
    """What the device reached for a moment: matrix products and copies, measured by `probe --bench`."""

    device: str
    threads: int = 0
    """Of the processor; 0 on an accelerator."""
    flops: dict[str, float]
    """Floating-point operations a second, by precision."""
    copy_bytes_per_second: float
    """Bytes read plus bytes written."""
    seconds: float
    date: str = ""
    """Day on which it was measured, ISO."""
    torch: str = ""
    """Version that measured it."""
    disturbed: bool = False
    """Other programs used the processor meanwhile: such figures are shown and not reckoned with."""


class Hardware(Record, frozen=True, kw_only=True):
    """The machine that will train."""

    accelerators: tuple[Accelerator, ...] = ()
    ram_bytes: int
    """Installed memory or the cgroup's limit, whichever is smaller."""
    ram_free_bytes: int
    cpu_cores: int
    """Cores this process may use: affinity and cgroup quota applied."""
    cpu_name: str = ""
    cpu_features: tuple[str, ...] = ()
    """Instruction sets that change the advice: avx2, avx512f, avx512_bf16, amx_bf16, ..."""
    volumes: tuple[Volume, ...] = ()
    os: str = ""
    origin: Origin = "probed"
    findings: tuple[Finding, ...] = ()
    rates: MatrixBench | None = None
    """What was measured here lately, by the same torch on as many cores; time estimates begin with it."""

    @property
    def device_name(self) -> str:
        """Name of what trains here: the first accelerator, or the processor."""
        return self.accelerators[0].name if self.accelerators else self.cpu_name


# --- the model -----------------------------------------------------------------------------------


class ModelShape(Record, frozen=True, kw_only=True):
    """Dimensions of a decoder-only transformer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    full_attention_layers: int | None = None
    """Layers that attend over the whole context; None means all."""
    experts: int = 0
    experts_per_token: int = 0


class ModelSpec(Record, frozen=True, kw_only=True):
    """A model that can be tuned, known from kb/, from its config.json or from the hub."""

    id: str
    revision: str | None = None
    path: str | None = None
    """Local folder, when the model lies on this machine."""
    family: str = ""
    architecture: str
    """`architectures[0]` of config.json, for example LlamaForCausalLM."""
    model_type: str
    shape: ModelShape
    parameters: int
    active_parameters: int | None = None
    """Parameters used per token, where it differs (mixture of experts)."""
    context_tokens: int
    instruct: bool = True
    licence: str | None = None
    commercial: bool | None = None
    """True: commercial use allowed (perhaps with conditions); None: unknown."""
    licence_note: str = ""
    gated: bool = False
    languages: tuple[str, ...] = ()
    chat_template: str | None = None
    """The Jinja source, where it was read."""
    has_chat_template: bool = True
    fp16_safe: bool = True
    gguf_architecture: str | None = None
    gguf_obstacle: str = ""
    """Why llama.cpp cannot cut text as the tokenizer does; empty where it can, or where it was not read."""
    weight_dtype: str = "bfloat16"
    source: str
    """kb/sources.toml key, or `config.json` when it was read from the model itself."""
    verified: bool = True
    findings: tuple[Finding, ...] = ()
    unknown: tuple[str, ...] = ()
    """What its files say that is not known here, or do not say: an estimate names it and widens its band."""


# --- the data ------------------------------------------------------------------------------------


class Histogram(Record, frozen=True, kw_only=True):
    """Token lengths of rows: `counts[i]` rows have at most `edges[i]` tokens (and more than `edges[i-1]`)."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


class DatasetProfile(Record, frozen=True, kw_only=True):
    """What a dataset holds, probed from the file or declared in a scenario."""

    name: str
    origin: Origin
    kind: DataKind
    rows: int = 0
    path: str | None = None
    """File, folder or hub id."""
    sha256: str | None = None
    bytes: int | None = None
    format: str | None = None
    """json, jsonl, csv, tsv, parquet, text."""
    columns: tuple[str, ...] = ()
    mapping: dict[str, str] = {}
    """Canonical role -> column, for example prompt -> instruction, context -> input."""
    mean_tokens: float | None = None
    p50_tokens: int | None = None
    p95_tokens: int | None = None
    max_tokens: int | None = None
    lengths: Histogram | None = None
    tokens_measured: bool = False
    """True when counted with the model's own tokenizer; False when estimated from characters."""
    mean_supervised_tokens: float | None = None
    languages: tuple[str, ...] = ()
    classes: int | None = None
    tasks: int | None = None
    task_rows: tuple[int, ...] = ()
    tenants: int | None = None
    holdout_rows: int | None = None
    duplicate_fraction: float | None = None
    mixed_templates: bool = False
    has_tools_column: bool | None = None
    on_policy: bool | None = None
    positive_fraction: float | None = None
    pair_similarity: float | None = None
    baseline_pass_rate: float | None = None
    role: Literal["train", "earlier_task"] = "train"
    findings: tuple[Finding, ...] = ()


# --- the wish ------------------------------------------------------------------------------------


class Goal(Record, frozen=True, kw_only=True):
    """What the person wants, in their words and as far as it was understood."""

    text: str = ""
    deploy: str = ""
    """Where the model must run afterwards, in the person's words."""
    priorities: tuple[str, ...] = ()
    context_tokens: int | None = None
    commercial: bool | None = None
    must_not_forget: bool = False
    requested_method: str | None = None
    storage_per_task_kb: float | None = None
    max_hours: float | None = None
    model_state: Literal["own_sft", "merged", "has_adapter"] | None = None
    force: bool = False


class UnderstoodGoal(Record, frozen=True, kw_only=True):
    """What a Goal was taken to mean, with the phrases that led there."""

    task: str
    """Task word: chat, style, classification, facts, ... or `instruction` when nothing was said."""
    tasks: tuple[str, ...] = ()
    """All task words found, the strongest first."""
    deploy: str
    """Key of kb/rules/deploy.toml: phone, laptop, offline, server, ... or `unstated`."""
    device_bytes: int | None = None
    """Memory of the device that will run it, where it was said or is usual for it."""
    wants_gguf: bool = False
    wishes: tuple[str, ...] = ()
    """Constraints: commercial, must_not_forget, small, best, low_latency, ..."""
    requested_method: str | None = None
    """Tuner id asked for."""
    requested_objective: str | None = None
    """Objective id asked for."""
    phrases: dict[str, str] = {}
    """What was understood -> the words that led to it."""
    out_of_scope: str | None = None
    """Key of [scope] in kb/rules/goals.toml, where the wish is none for a language model."""
    unclear: tuple[str, ...] = ()
    """What was not said and had to be assumed."""


class StartFrom(Record, frozen=True, kw_only=True):
    """A finished run whose result is trained further."""

    folder: str
    result: Literal["adapter", "model"]
    tuner: str
    shape: dict[str, Value] = {}
    """Settings that say what the adapter looks like; it keeps them."""
    untrained_losses: dict[str, float] = {}
    """Held-out loss of each of its datasets before that run had learned it, by the name it has now."""


class Scenario(Record, frozen=True, kw_only=True):
    """Everything that planning needs, whether probed or declared."""

    hardware: Hardware
    model: str
    """`auto`, a hub id, a path or any words."""
    spec: ModelSpec | None = None
    """The model read from its folder or hub entry; None lets the recommender look `model` up in kb/."""
    datasets: tuple[DatasetProfile, ...] = ()
    goal: Goal = Goal()
    overrides: dict[str, Value] = {}
    """`--set key=value`: obeyed, shown and warned about when outside the sourced range."""
    start: StartFrom | None = None
    """Set when an earlier run is continued."""


# --- the estimate --------------------------------------------------------------------------------


TUNER_SIZES = frozenset({"in", "out", "min", "max", "r", "1/r", "1"})


class TunerMemory(Record, frozen=True, kw_only=True):
    """Memory of a tuner that is stated as data, for each layer that it tunes unless it says `once`.

    Each mapping is a sum: products of sizes (`in` and `out` of the layer, `min` and `max` of the two, the
    rank `r`, `1/r`, `1`) to their factors; `{"in*r" = 1, "out*r" = 1}` is LoRA's. What is `once` is held for
    all layers together, as wide as the widest.
    """

    trained: dict[str, float]
    """Parameters."""
    trained_once: dict[str, float] = {}
    frozen_bytes: dict[str, float] = {}
    """Of fixed tensors beside the model's."""
    frozen_once_bytes: dict[str, float] = {}
    token_bytes: dict[str, float] = {}
    """Kept for the backward pass, for each token; read off a loop without autocast, parameters in 32 bits."""
    kept_bytes: dict[str, float] = {}
    """Kept for the backward pass, whatever the batch: matrices that are made of the parameters."""

    def __post_init__(self) -> None:
        """Refuse a size that does not exist."""
        sums = (self.trained, self.trained_once, self.frozen_bytes, self.frozen_once_bytes)
        names = {
            name
            for one in (*sums, self.token_bytes, self.kept_bytes)
            for term in one
            for name in term.split("*")
        }
        if strange := names - TUNER_SIZES:
            raise ValueError(f"unknown size {min(strange)!r}; valid: {', '.join(sorted(TUNER_SIZES))}")


class MemorySettings(Record, frozen=True, kw_only=True):
    """What decides the memory of one training step; the input of the estimator."""

    tuner: str = "lora"
    objective: str = "sft"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision (autocast); `weight_bits` says how the base is stored."""
    weight_bits: Literal[4, 8, 16, 32] = 16
    micro_batch: int = 1
    seq_len: int = 2048
    gradient_checkpointing: bool = True
    checkpoint_every: int = 1
    optimizer: str = "adamw_torch"
    lora_r: int = 16
    target: str = "all-linear"
    attention: Literal["flash", "sdpa", "eager"] = "sdpa"
    loss: Literal["full_logits", "chunked"] = "chunked"
    packed: bool = False
    double_quant: bool = True
    virtual_tokens: int = 0
    bottleneck: int = 0
    bottleneck_style: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: two adapters in every block; pfeiffer: one."""
    preserved_share: float = 0.5
    """Share of each matrix's singular directions that orthogonal-subspace tuning leaves as they are."""
    generations: int = 0
    completion_tokens: int = 0
    classes: int = 0
    """Outputs of a classifier head."""
    gpus: int = 1
    shard: Literal["none", "fsdp", "zero3"] = "none"
    offload: bool = False
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    autocast: bool = True
    """Matrix products run under torch.autocast, as the trainers do in bf16 and fp16."""
    adapter_bits: Literal[16, 32] | None = None
    """Width of adapter weights; None: 32, as our programs hold them (TRL alone: 16 on 4 bits)."""
    accumulate: bool = True
    """Gradients of earlier micro batches are held while the next one is computed."""
    optimizer_in_backward: bool = False
    """Each gradient is used and let go of at once; none is accumulated."""
    offload_activations: bool = False
    """What the blocks keep waits in the memory of the host."""
    stated: TunerMemory | None = None
    """Of a tuner that the closed form has no counts of its own for."""
    unknown: tuple[str, ...] = ()
    """In words, what is not known of the question and how it is counted; it widens the band."""


class Part(Record, frozen=True, kw_only=True):
    """One part of the memory, with the formula it came from."""

    name: str
    bytes: int
    formula: str
    source: str


class MemoryEstimate(Record, frozen=True, kw_only=True):
    """Peak memory of one training process on its fullest device."""

    phase: str
    """The phase with the peak: load, forward, backward, optimizer, evaluation, generation, save."""
    parts: tuple[Part, ...]
    allocated_bytes: Band
    reserved_bytes: Band
    peak_bytes: Band
    """What the device loses, context included; a plan decides on `peak_bytes.high`."""
    trainable_parameters: int
    engine: Literal["closed_form", "trace"] = "closed_form"
    notes: tuple[str, ...] = ()
    """What was unknown and widened the band."""


class TracedPeaks(Record, frozen=True, kw_only=True):
    """Bytes of live tensors in a traced step."""

    steady: int
    """Before the step."""
    forward: int
    backward: int
    optimizer: int
    traced_blocks: tuple[int, ...] = ()
    """Depths that were traced when the model's own was not; the peaks are then extrapolated."""

    @property
    def fullest(self) -> tuple[str, int]:
        """The phase with the peak, and its bytes."""
        phases = {"forward": self.forward, "backward": self.backward, "optimizer": self.optimizer}
        return max(phases.items(), key=lambda phase: phase[1])


class TimeEstimate(Record, frozen=True, kw_only=True):
    """How long training takes."""

    steps: int
    seconds_per_step: Band
    seconds: Band
    tokens_per_second: Band
    source: str
    """Where the device's rates are from: a key of kb/sources.toml, or `measured here on DATE (versions)`."""
    notes: tuple[str, ...] = ()


# --- the plan (schema ftadvisor.plan/1; field names are the contract's) --------------------------


class Why(Record, frozen=True, kw_only=True):
    """The reason and the source (kb/sources.toml key) of one setting."""

    reason: str
    source: str


class StageEstimate(Record, frozen=True, kw_only=True):
    """What a stage costs."""

    peak_bytes: Band
    parts: dict[str, int]
    seconds: Band
    seconds_source: str = ""
    """As in TimeEstimate."""
    tokens_per_second: Band | None = None
    disk_bytes: int
    phase: str = ""
    trainable_parameters: int = 0
    notes: tuple[str, ...] = ()
    """What was unknown and widened the band of the memory."""


class Stage(Record, frozen=True, kw_only=True):
    """One objective with its settings."""

    objective: Objective
    program: str
    """Folder under recipes/ that runs it."""
    settings: dict[str, Value]
    why: dict[str, Why]
    estimate: StageEstimate
    datasets: tuple[str, ...] = ()
    """Names of the datasets this stage trains on."""


class PlanModel(Record, frozen=True, kw_only=True):
    """The chosen model, as the contract shows it."""

    id: str
    parameters: int
    licence: str | None
    revision: str | None = None
    path: str | None = None
    architecture: str = ""
    model_type: str = ""
    instruct: bool = True
    has_chat_template: bool = True
    gated: bool = False


class ExportPlan(Record, frozen=True, kw_only=True):
    """Whether and how the result becomes a file that runs offline."""

    feasible: bool
    format: str
    route: str
    quant: str
    file_bytes: int
    reason: str = ""


class PlanWarning(Record, frozen=True, kw_only=True):
    """A risk that the person must or should know."""

    code: str
    severity: Literal["must", "should"]
    message: str
    remedy: str
    source: str
    handled: bool = False
    """The plan and its program take care of it; nothing is left to do."""


class Alternative(Record, frozen=True, kw_only=True):
    """Something else worth doing."""

    code: str
    message: str


class Candidate(Record, frozen=True, kw_only=True):
    """One way that was considered, with what speaks for and against it."""

    method: str
    verdict: Literal["chosen", "possible", "rejected"]
    score: float
    reasons: tuple[str, ...]
    model: str = ""
    objectives: tuple[str, ...] = ()
    precision: str = ""
    weight_bits: int = 16
    parallel: Parallel = "none"
    peak_bytes: Band | None = None


class Plan(Record, frozen=True, kw_only=True):
    """The advice: written as plan.json and printed by `plan --json`."""

    schema: str = "ftadvisor.plan/1"
    ok: bool = True
    verdict: Verdict
    method: str
    task_kind: str
    stages: tuple[Stage, ...]
    model: PlanModel | None
    parallel: Parallel
    export: ExportPlan | None
    warnings: tuple[PlanWarning, ...]
    alternatives: tuple[Alternative, ...]
    candidates: tuple[Candidate, ...]
    summary: str = ""
    """One paragraph in plain words: what, why, risk."""
    assumptions: tuple[str, ...] = ()
    """What was not told and therefore assumed, and how the goal was understood."""
    hardware: Hardware | None = None
    datasets: tuple[DatasetProfile, ...] = ()
    goal: Goal = Goal()
    processes: int = 1
    """How many devices `parallel` spreads over."""
    start: StartFrom | None = None
    """The earlier run that the first stage goes on from."""
    apart: bool = False
    """True when every stage begins from the base and trains an adapter of its own, for one dataset each."""


# --- the recipe ----------------------------------------------------------------------------------


class RecipeDataset(Record, frozen=True, kw_only=True):
    """One dataset of a recipe: where it lies, what it held when the plan was made."""

    name: str
    path: str
    kind: DataKind
    sha256: str | None = None
    mapping: dict[str, str] = {}
    format: str | None = None
    role: Literal["train", "earlier_task"] = "train"
    """`earlier_task`: replayed in the share `replay_fraction`, and always measured."""
    untrained_loss: float | None = None
    """Of an earlier task: the held-out loss before an earlier run had learned it."""


class RecipeModel(Record, frozen=True, kw_only=True):
    """The base model of a recipe."""

    id: str
    path: str | None = None
    revision: str | None = None
    after: str | None = None
    """Folder of the stage whose result this one begins with, relative to the run folder."""


class Lineage(Record, frozen=True, kw_only=True):
    """Where a recipe comes from that the supervisor made of another one while it ran."""

    of: tuple[str, ...]
    """SHA-256 of the recipe files before it, the planned one first; their checkpoints are continued from."""
    attempt: int
    """2 for the first derived recipe."""
    reason: str
    newest_step: int | None = None
    """Later checkpoints of theirs are not used; None: all are."""
    finish: bool = False
    """The newest usable checkpoint is the result; nothing more is trained."""
    rates_lowered: int = 0
    consents: tuple[str, ...] = ()


class RecipeParallel(Record, frozen=True, kw_only=True):
    """How one training is spread over several processes of one machine, one device each."""

    kind: Literal["ddp", "fsdp", "zero3"]
    """ddp: every process holds the whole model. fsdp, zero3: each holds a part of it."""
    processes: int
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` proves that the spreading works; it is no faster."""


class Recipe(Record, frozen=True, kw_only=True):
    """All that a program needs to train one stage; a person may read, edit and run it again."""

    version: int = 1
    program: str
    objective: Objective
    tuner: str
    model: RecipeModel
    datasets: tuple[RecipeDataset, ...]
    settings: dict[str, Value]
    seed: int = 42
    parallel: RecipeParallel | None = None
    """None: one process on one device."""
    packages: dict[str, str] = {}
    """Versions that were installed when the recipe was written; information, not a constraint."""
    lineage: Lineage | None = None
    """Set in a recipe that the supervisor derived during a run; None in a planned one."""


class ProgramKey(Record, frozen=True, kw_only=True):
    """One key that a training program accepts: recipes/<program>/program.toml."""

    type: Literal["int", "float", "bool", "str", "list", "table"]
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    tuners: tuple[str, ...] = ()
    """Tuners that read it; empty: all."""
    doc: str = ""


class Program(Record, frozen=True, kw_only=True):
    """What a training program accepts."""

    title: str = ""
    objectives: tuple[str, ...] = ()
    tuners: tuple[str, ...] = ()
    sharded: tuple[str, ...] = ()
    """Tuners that it trains with the weights spread over several devices."""
    keys: dict[str, ProgramKey]


# --- run, export, verification -------------------------------------------------------------------


class StepProbe(Record, frozen=True, kw_only=True):
    """What a few real steps took before a training: measured on its own device, at its longest rows."""

    stage: str
    fits: bool
    reason: str = ""
    """Why it does not fit."""
    smaller: dict[str, Value] = {}
    """The next best settings, where it does not fit and there are any."""
    predicted_peak_bytes: Band | None = None
    measured_peak_bytes: int | None = None
    available_bytes: int = 0
    predicted_seconds: Band | None = None
    seconds: float | None = None
    """Of the whole training, worked out of the steps that were measured; saving is not counted."""
    whole_peak_bytes: Band | None = None
    """Of the whole training, by what was measured: a narrower band than the plan's."""
    whole_seconds: Band | None = None
    """The same for its time."""
    seconds_per_step: float | None = None
    cpu_seconds: float | None = None
    cpu_seconds_per_step: float | None = None
    ready_seconds: float | None = None
    """Until the libraries, the data and the model are loaded."""
    reference_seconds: float | None = None
    evaluation_seconds: float | None = None
    """Of one evaluation on all held-out rows."""
    asking_seconds: float | None = None
    """Of questions and rows before and after the training, together."""
    steps_planned: int = 0
    steps_measured: int = 0
    longest_tokens: int = 0


class Observation(Record, frozen=True, kw_only=True):
    """One line of the local calibration file: what was predicted, and what was measured then."""

    version: int = 1
    time: str
    kind: Literal["run", "probe", "bench"]
    device: str
    cpu_cores: int
    packages: dict[str, str] = {}
    model: str = ""
    objective: str = ""
    tuner: str = ""
    settings: dict[str, Value] = {}
    steps: int = 0
    predicted_peak_bytes: Band | None = None
    measured_peak_bytes: int | None = None
    predicted_seconds: Band | None = None
    measured_seconds: float | None = None
    probed_seconds: float | None = None
    """What the probe said before the run."""
    predicted_tokens_per_second: Band | None = None
    measured_tokens_per_second: float | None = None
    bench: MatrixBench | None = None


class Asked(Record, frozen=True, kw_only=True):
    """One prompt with the greedy answer of a model."""

    prompt: str
    answer: str
    tokens: int
    ended: bool
    """Whether the model ended its answer by itself."""
    right: bool | None = None
    """None: there is nothing to check it by."""
    exact: bool | None = None
    """Whether it says word for word what the data say; None for short answers, which are right or wrong."""
    reference: str | None = None
    skill: str = ""
    dataset: str = ""
    """Whose row it is; empty for general questions."""


class RowLoss(Record, frozen=True, kw_only=True):
    """What a model makes of one row that is not trained on."""

    dataset: str
    tokens: int
    loss: float
    """Sum over the row's trained tokens."""
    swapped: float | None = None
    """The same for the answer behind the question of another row."""


class Measured(Record, frozen=True, kw_only=True):
    """What was asked of a model at one time: evaluation-before.json, evaluation-after.json."""

    rows: tuple[RowLoss, ...] = ()
    samples: tuple[Asked, ...] = ()
    """Questions of rows that are not trained on."""
    probes: tuple[Asked, ...] = ()
    """General questions, the same for every run of this model."""
    seconds: float = 0.0


class Change(Record, frozen=True, kw_only=True):
    """One figure before and after, with the interval of the change where one is known."""

    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None
    rows: int = 0
    better: Literal["lower", "higher"] = "higher"


class Evaluation(Record, frozen=True, kw_only=True):
    """What the training changed, and what that amounts to."""

    verdict: Literal["better", "no_different", "worse", "forgot", "not_learned", "unknown"]
    """`not_learned`: of a run with earlier tasks, which is to learn a new one beside them."""
    evidence: tuple[str, ...]
    """What the verdict rests on, the weightiest first."""
    not_learned: tuple[str, ...] = ()
    """Beside earlier tasks: which new ones were not learned, in words."""
    changes: tuple[Change, ...] = ()
    examples: tuple[tuple[str, str, str], ...] = ()
    """Prompt, answer before, answer after."""


class TaskScore(Record, frozen=True, kw_only=True):
    """What a task of lm-evaluation-harness says of the model before and after."""

    task: str
    metric: str
    before: float
    after: float
    before_error: float | None = None
    """Standard error; None where the harness gives none."""
    after_error: float | None = None


class StageOutcome(Record, frozen=True, kw_only=True):
    """Predicted against measured of one stage; the fields mean what they do in RunReport."""

    stage: str
    steps: int
    seconds: float
    predicted_seconds: Band | None
    probed_seconds: float | None
    whole_seconds: Band | None = None
    predicted_peak_bytes: Band | None
    measured_peak_bytes: int | None
    probed_peak_bytes: int | None
    whole_peak_bytes: Band | None = None
    predicted_tokens_per_second: Band | None
    tokens_per_second: float | None
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None


class RunReport(Record, frozen=True, kw_only=True):
    """What happened: report.json (schema ftadvisor.report/1)."""

    schema: str = "ftadvisor.report/1"
    ok: bool
    status: Literal["done", "failed", "interrupted", "refused"]
    recipe_sha256: str
    program: str
    method: str
    steps: int
    steps_planned: int
    seconds: float
    predicted_seconds: Band | None = None
    """Of the whole run, by the plan."""
    probed_seconds: float | None = None
    """Of the whole run, by the steps that were measured before it."""
    whole_seconds: Band | None = None
    """The band of the same."""
    predicted_peak_bytes: Band | None
    measured_peak_bytes: int | None
    probed_peak_bytes: int | None = None
    """At the longest rows, measured before the first step."""
    whole_peak_bytes: Band | None = None
    """Of the whole run, by the same steps: narrower than what was predicted."""
    predicted_tokens_per_second: Band | None = None
    tokens_per_second: float | None
    """Of the steps, padding not counted."""
    earlier_stages: tuple[StageOutcome, ...] = ()
    """Of the same run; all else here is of the last one."""
    first_loss: float | None
    last_loss: float | None
    heldout_loss_before: float | None
    heldout_loss_after: float | None
    heldout_figures: dict[str, dict[str, float]] = {}
    """Before and after: all that was measured on what was not trained on: loss, loss of each dataset,
    accuracy, margin, reward."""
    kept: dict[str, float] = {}
    """Of each earlier task, the share that is left of what was learned: answers word for word, else loss."""
    forgotten: tuple[str, ...] = ()
    """What was lost of earlier tasks beyond the limit, in words; then `ok` is false, though it is done."""
    not_learned: tuple[str, ...] = ()
    """What of the new was not learned beside earlier tasks, in words; then too `ok` is false."""
    supervised_tokens: int | None
    trainable_parameters: int | None
    artefacts: dict[str, str]
    """name -> path relative to the run folder: adapter, model, checkpoint."""
    decisions: tuple[str, ...] = ()
    evaluation_seconds: float | None = None
    """Of asking before and after, which is part of `seconds`; None where nothing was asked."""
    evaluation: Evaluation | None = None
    """Before and after, with a verdict; None where nothing was measured."""
    tasks: tuple[TaskScore, ...] = ()
    """Of lm-evaluation-harness, where they were asked for."""
    packages: dict[str, str] = {}
    error: str | None = None
    remedy: str | None = None


class ExportedFile(Record, frozen=True, kw_only=True):
    """One file that an export wrote."""

    path: str
    kind: Literal["gguf", "merged", "adapter", "lora_gguf", "prefix_state", "modelfile", "card"]
    quant: str | None
    bytes: int
    sha256: str
    bits_per_weight: float | None = None
    mix: dict[str, int] = {}
    """tensor type -> number of tensors: the true mix, fall-backs included."""
    importance: bool = False
    """Quantised with an importance matrix."""


class Export(Record, frozen=True, kw_only=True):
    """What an export produced."""

    schema: str = "ftadvisor.export/1"
    ok: bool = True
    source: str
    files: tuple[ExportedFile, ...]
    kept: tuple[ExportedFile, ...] = ()
    """Of earlier exports of the same model into the same folder."""
    model: str = ""
    """Checksum of names, sizes and times of change of what was exported."""
    notes: tuple[str, ...] = ()


class FileRow(Record, frozen=True, kw_only=True):
    """One exported GGUF file beside the others; a figure that was not measured is None."""

    path: str
    quant: str
    bytes: int
    bits_per_weight: float
    proved: bool | None
    kl_mean: float | None
    """Divergence from the trained model's next-token distribution, in nats."""
    top1: float | None
    """Share of positions with the same likeliest token."""
    perplexity_change: float | None
    """Of the text that was compared, as a share of the trained model's."""
    tokens_per_second: float | None
    """Generated on the machine that proved it."""
    running_bytes: int
    """File, key-value cache of the wanted context, overhead."""
    fits: bool | None
    """On the device that the goal names; None where it names none."""
    importance: bool = False
    """Quantised with an importance matrix."""
    recommended: bool = False


class Check(Record, frozen=True, kw_only=True):
    """One comparison between the trained model and the file."""

    name: CheckName
    passed: bool
    measured: dict[str, float | int | str | bool | None]
    bound: dict[str, float | int | str | bool | None]
    evidence: str


class Verification(Record, frozen=True, kw_only=True):
    """The proof: verification.json (schema ftadvisor.verification/1)."""

    schema: str = "ftadvisor.verification/1"
    ok: bool = True
    passed: bool
    gguf: str
    against: str
    quant: str
    checks: tuple[Check, ...]


# --- the knowledge base (kb/*.toml; the table name in the file is the key) ------------------------


class Source(Record, frozen=True, kw_only=True):
    """Where a fact was read: one table of kb/sources.toml."""

    title: str
    reference: str
    """Repository and commit, paper id, or document; never a package registry."""
    checked: str
    """ISO date of the last reading."""
    verified: bool = True
    """False: from memory or second hand; a lead."""


class AcceleratorFacts(Record, frozen=True, kw_only=True):
    """One table of kb/hardware/<vendor>.toml."""

    name: str
    vendor: Literal["nvidia", "amd", "apple", "intel"]
    aliases: tuple[str, ...] = ()
    generation: str = ""
    memory_gib: Annotated[float, msgspec.Meta(gt=0)]
    """For Apple: the unified memory of the usual configuration."""
    compute_capability: str | None = None
    bf16: bool
    flash_attention: bool
    bitsandbytes: bool
    tflops: float | None = None
    """Dense 16-bit matrix rate with 32-bit accumulation."""
    bandwidth_gb_per_s: float | None = None
    source: str
    checked: str
    verified: bool = True
    note: str = ""


class ModelFacts(Record, frozen=True, kw_only=True):
    """One table of kb/models/<family>.toml; the key is the hub id."""

    family: str
    architecture: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    full_attention_layers: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    parameters: int
    active_parameters: int | None = None
    context_tokens: int
    instruct: bool
    base_of: str | None = None
    """Hub id of the instruct twin, for a base model."""
    licence: str
    commercial: bool
    licence_note: str = ""
    gated: bool
    languages: tuple[str, ...] = ("en",)
    strengths: tuple[str, ...] = ()
    """Task words this model is good at: reasoning, code, tool_calling, multilingual, ..."""
    released: str = ""
    """Year-month; between equals, the recommender prefers the newer."""
    recommend: bool = True
    """False: known, but never chosen for `auto`."""
    fp16_safe: bool = True
    gguf_architecture: str | None = None
    source: str
    checked: str
    verified: bool = True
    note: str = ""


class Quantisation(Record, frozen=True, kw_only=True):
    """One table of kb/quantisations.toml; the key is llama.cpp's name."""

    bits_per_weight: float
    perplexity_increase_percent: float | None = None
    """On a 70B model, where the source gives it."""
    small_model_log_ratio: float | None = None
    """ln(perplexity ratio) on a 2B model, where the source gives it."""
    kl_mean: float | None = None
    plain: str
    minimum_parameters: int = 0
    """Below this size the planner does not choose it by itself."""
    source: str
    checked: str
    verified: bool = True


class WarningFacts(Record, frozen=True, kw_only=True):
    """One table of kb/warnings.toml; the key is the code. Texts may hold {placeholders}."""

    severity: Literal["must", "should"]
    message: str
    remedy: str
    source: str
    checked: str
    handled: bool = False
    """What follows from it is always part of the plan, so that the person need not act."""


class Failure(Record, frozen=True, kw_only=True):
    """One table of kb/failures.toml: what a failing run looks like and what helps."""

    signature: str
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    source: str
    checked: str
    verified: bool = True


class Topic(Record, frozen=True, kw_only=True):
    """One table of kb/topics.toml: a term or setting explained by `ftadvisor explain`."""

    title: str
    plain: str
    """For a newcomer, two or three sentences."""
    exact: str
    """For a specialist: definition, range, effect."""
    see: tuple[str, ...] = ()
    source: str
    checked: str
    verified: bool = True


class ObjectiveFacts(Record, frozen=True, kw_only=True):
    """kb/methods/<id>.toml: a training objective. `plain` and `exact` are shown by explain."""

    title: str
    plain: str
    exact: str
    program: str
    """Folder under recipes/ that trains it."""
    data_kinds: tuple[DataKind, ...]
    needs_policy: bool = False
    """True: starts from a model that already follows instructions (sft first for a base)."""
    settings: dict[str, Value] = {}
    """Defaults of this objective beyond the learning rate."""
    learning_rate: dict[str, LearningRate]
    """tuner group -> learning rate: full, lora, and others by tuner id."""
    source: str
    checked: str
    verified: bool = True


class LearningRate(Record, frozen=True, kw_only=True):
    """A sourced learning rate with the range that its sources span."""

    value: float
    low: float
    high: float
    source: str
    note: str = ""


class TunerFacts(Record, frozen=True, kw_only=True):
    """kb/tuners/<id>.toml: how the weights move."""

    title: str
    plain: str
    exact: str
    group: str
    """Learning-rate group: full, lora, or its own id."""
    quantised_base: bool = False
    mergeable: bool = True
    needs_native_bias: bool = False
    not_on: tuple[str, ...] = ()
    """Model types whose layers it cannot take apart."""
    stored_bits: Literal[0, 32] = 0
    """How the base must be held; 0: as the machine computes."""
    adds_bias_to: tuple[str, ...] = ()
    """Model types that get biases of zero where they have none, since every part of the way knows them."""
    gradient_checkpointing: bool = True
    packing: bool = True
    program: str = ""
    """Folder under recipes/ that trains it in place of the objective's."""
    elsewhere: str = ""
    """Why it is not trained with the objectives whose programs do not list it."""
    apart: bool = False
    """True when the result is a small folder beside the base, so that each task can have its own."""
    adds_latency: bool = False
    gguf: Literal["merged", "merged_or_lora", "virtual_tokens", "sequence_state", "none"]
    gguf_note: str = ""
    settings: dict[str, Value] = {}
    """Defaults of this tuner: lora_r, lora_alpha, target, virtual_tokens, ..."""
    quality: float
    """Share of the best method's gain kept, by the cross-method benchmark named in `source`; 0 to 1."""
    forgetting: float
    """Relative forgetting by the same benchmark; 0 is none."""
    memory: TunerMemory | None = None
    """Of one that the estimator has no counts of its own for; without it, it counts as its group does."""
    source: str
    checked: str
    verified: bool = True


# --- explain ---------------------------------------------------------------------------------------


class Explanation(Record, frozen=True, kw_only=True):
    """What kb/ says about one topic."""

    title: str
    plain: str
    """For a newcomer."""
    exact: str = ""
    """For a specialist."""
    facts: tuple[tuple[str, str], ...] = ()
    """Label and value, in the order to show them."""
    sources: tuple[Source, ...] = ()
