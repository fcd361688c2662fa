"""Which weight matrices, vectors and tables does a model have?

Goes in: a ModelSpec. Comes out: `Layout` with every linear layer by the name that PEFT matches, every norm
and every table, so that counts are exact for the families below. Never does: read files, import a model
library, guess in silence: an unknown family is laid out like Llama, scaled to its stated size, and
`Layout.exact` says so.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from advisor.types import ModelShape, ModelSpec, Record

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "attn.c_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "mlp.c_proj")
QUERY_VALUE = ("q_proj", "v_proj", "qkv_proj", "c_attn")
LLAMA_LIKE = frozenset({"llama", "mistral", "granite", "smollm3", "ministral", "seed_oss"})
QK_NORM_PER_HEAD = frozenset({"qwen3", "gemma3_text"})
QK_NORM_WHOLE = frozenset({"olmo2", "olmo3"})
FOUR_NORMS = frozenset({"gemma2", "gemma3_text"})
GEMMA = frozenset({"gemma", "gemma2", "gemma3_text"})
KNOWN = LLAMA_LIKE | QK_NORM_PER_HEAD | QK_NORM_WHOLE | GEMMA | {"qwen2", "phi3", "gpt2"}


class Linear(Record, frozen=True, kw_only=True):
    """One linear layer, present once in every block."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Entries of the matrix, without the bias."""
        return self.inputs * self.outputs


class Layout(Record, frozen=True, kw_only=True):
    """All weights of a decoder-only transformer."""

    linears: tuple[Linear, ...]
    """Of one block."""
    blocks: int
    norm_entries: tuple[tuple[str, int], ...]
    """Norm vectors of one block: name and entries, biases included."""
    final_norm: int
    embedding: int
    positions: int
    head: int
    """Entries of the output matrix; 0 when it is the embedding itself."""
    other: int
    """Entries that the model has beyond those above (experts of a mixture, unknown parts)."""
    exact: bool
    experts: bool = False
    """A mixture: its MLP stands for the experts that one token passes, `other` holds the rest of them."""
    note: str = ""

    @property
    def block_weights(self) -> int:
        """Matrix entries of one block."""
        return sum(linear.weights for linear in self.linears)

    @property
    def quantised_weights(self) -> int:
        """Matrix entries that loading in 4 or 8 bits quantises: single layers, so no experts, which the model
        library keeps together in one tensor."""
        if self.experts:
            return self.blocks * sum(one.weights for one in self.linears if one.name in ATTENTION)
        return self.blocks * self.block_weights + self.other

    @property
    def block_biases(self) -> int:
        """Bias entries of one block, norms excluded."""
        return sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def block_norms(self) -> int:
        """Norm entries of one block."""
        return sum(entries for _, entries in self.norm_entries)

    @property
    def parameters(self) -> int:
        """All entries, the tied output matrix counted once."""
        block = self.block_weights + self.block_biases + self.block_norms
        return (
            self.blocks * block + self.final_norm + self.embedding + self.positions + self.head + self.other
        )


def layout(spec: ModelSpec) -> Layout:
    """Lay out the weights of `spec`; exact for the families in `KNOWN` without experts or unknown parts."""
    plain = _gpt2(spec) if spec.model_type == "gpt2" else _llama(spec)
    unknown = list(spec.unknown)
    strange = spec.model_type not in KNOWN and not unknown
    if strange or spec.shape.experts:
        what = "a mixture of experts" if spec.shape.experts else f"the architecture {spec.architecture!r}"
        unknown.append(
            f"{what} has no exact layout here: laid out like Llama, the rest taken from the stated size"
        )
    if not unknown:
        return plain
    other = max(0, spec.parameters - plain.parameters)
    return msgspec.structs.replace(
        plain, other=other, exact=False, experts=bool(spec.shape.experts), note="; ".join(unknown)
    )


def _llama(spec: ModelSpec) -> Layout:
    shape = spec.shape
    return Layout(
        linears=_linears(spec.model_type, shape),
        blocks=shape.layers,
        norm_entries=_norms(spec.model_type, shape),
        final_norm=shape.hidden,
        embedding=shape.vocab * shape.hidden,
        positions=0,
        head=0 if shape.tied else shape.vocab * shape.hidden,
        other=0,
        exact=True,
    )


def _linears(model_type: str, shape: ModelShape) -> tuple[Linear, ...]:
    hidden, ffn = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = shape.mlp_bias
    if model_type == "phi3":
        return (
            Linear(name="qkv_proj", inputs=hidden, outputs=query + 2 * key),
            Linear(name="o_proj", inputs=query, outputs=hidden),
            Linear(name="gate_up_proj", inputs=hidden, outputs=2 * ffn),
            Linear(name="down_proj", inputs=ffn, outputs=hidden),
        )
    qkv_bias = shape.attention_bias or model_type == "qwen2"
    output_bias = shape.attention_bias and model_type != "qwen2"
    return (
        Linear(name="q_proj", inputs=hidden, outputs=query, bias=qkv_bias),
        Linear(name="k_proj", inputs=hidden, outputs=key, bias=qkv_bias),
        Linear(name="v_proj", inputs=hidden, outputs=key, bias=qkv_bias),
        Linear(name="o_proj", inputs=query, outputs=hidden, bias=output_bias),
        Linear(name="gate_proj", inputs=hidden, outputs=ffn, bias=mlp),
        Linear(name="up_proj", inputs=hidden, outputs=ffn, bias=mlp),
        Linear(name="down_proj", inputs=ffn, outputs=hidden, bias=mlp),
    )


def _norms(model_type: str, shape: ModelShape) -> tuple[tuple[str, int], ...]:
    if model_type in QK_NORM_WHOLE:
        names = [("post_attention_layernorm", shape.hidden), ("post_feedforward_layernorm", shape.hidden)]
    else:
        names = [("input_layernorm", shape.hidden), ("post_attention_layernorm", shape.hidden)]
    if model_type in FOUR_NORMS:
        names += [("pre_feedforward_layernorm", shape.hidden), ("post_feedforward_layernorm", shape.hidden)]
    if model_type in QK_NORM_PER_HEAD:
        names += [("q_norm", shape.head_dim), ("k_norm", shape.head_dim)]
    if model_type in QK_NORM_WHOLE:
        names += [("q_norm", shape.heads * shape.head_dim), ("k_norm", shape.kv_heads * shape.head_dim)]
    return tuple(names)


def _gpt2(spec: ModelSpec) -> Layout:
    shape = spec.shape
    hidden, ffn = shape.hidden, shape.intermediate
    return Layout(
        linears=(
            Linear(name="c_attn", inputs=hidden, outputs=3 * hidden, bias=True),
            Linear(name="attn.c_proj", inputs=hidden, outputs=hidden, bias=True),
            Linear(name="c_fc", inputs=hidden, outputs=ffn, bias=True),
            Linear(name="mlp.c_proj", inputs=ffn, outputs=hidden, bias=True),
        ),
        blocks=shape.layers,
        norm_entries=(("ln_1", 2 * hidden), ("ln_2", 2 * hidden)),
        final_norm=2 * hidden,
        embedding=shape.vocab * hidden,
        positions=spec.context_tokens * hidden,
        head=0 if shape.tied else shape.vocab * hidden,
        other=0,
        exact=True,
    )


def targeted(linears: Iterable[Linear], target: str) -> tuple[Linear, ...]:
    """Return the linear layers that `target` names.

    Args:
        linears: layers of one block.
        target: `all-linear`, `attention`, `q_v`, `mlp`, or module names with commas between.
    """
    groups = {"attention": ATTENTION, "q_v": QUERY_VALUE, "mlp": MLP}
    every = tuple(linears)
    if target == "all-linear":
        return every
    names = groups.get(target) or tuple(name.strip() for name in target.split(",") if name.strip())
    return tuple(one for one in every if one.name in names or one.name.rpartition(".")[2] in names)
