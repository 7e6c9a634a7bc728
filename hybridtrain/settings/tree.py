"""Every setting of a run: one typed, frozen tree, read from TOML with dotted overrides from the command line.

Lengths are in tokens, batches in sequences, learning rates per optimizer step. Unknown keys, wrong types and
contradictions raise one `SettingsError` that lists all of them.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from hybridtrain.choices import MemPlacement, Recompute, ScheduleName
from hybridtrain.model.feedforwards.dense import DenseSettings
from hybridtrain.model.feedforwards.moe import MoESettings
from hybridtrain.model.mixers.attention import AttentionSettings
from hybridtrain.model.registry import Components
from hybridtrain.section import Axis, Fraction, Natural, NonNegative, Positive, Section
from hybridtrain.settings.engram import EngramSettings

SpikeAction = Literal["stop", "skip", "rollback"]
VerifyLevel = Literal["full", "sizes"]


class RunSettings(Section):
    dir: str = Field(
        "runs/default", min_length=1, description="folder that receives metrics, checkpoints and the summary"
    )
    seed: Natural = Field(0, description="draws the parameters and the sample order")
    threads: Natural = Field(0, description="CPU threads per rank; 0 leaves torch's choice")
    slow_rank: NonNegative = Field(
        2.0,
        description="multiple of its pipeline stage's median step time, waiting apart, from which on a rank "
        "is named; 0: never",
    )


class DataSettings(Section):
    path: str = Field(
        "runs/data/sotu-4096",
        min_length=1,
        description="folder of token shards written by `hybridtrain data`",
    )
    source: tuple[str, ...] = Field(
        (), description="texts to make `path` from when it does not exist; `shipped:sotu` needs no download"
    )
    validation: tuple[str, ...] = Field(
        (), description="texts that are all held out when `path` is made; then none of `source` are"
    )
    text_field: str = Field("text", min_length=1, description="field of a JSON line that holds the text")
    vocab_size: Positive = Field(4096, description="entries of the BPE trained when `path` is made")
    tokenizer: str = Field(
        "", description="a tokenizer.json to use instead of training one when `path` is made"
    )
    separator: str = Field(
        "", description="token that stands before each document; empty: the first usual one of the tokenizer"
    )
    validation_fraction: Fraction = Field(
        0.05, description="share of whole documents held out when `path` is made"
    )
    shard_tokens: Positive = Field(50_000_000, description="tokens per shard when `path` is made")
    verify: bool = Field(True, description="check the shards' checksums before training")


class ModelSettings(Section):
    dim: Positive = Field(128, description="width of the residual stream")
    layers: tuple[str, ...] = Field(
        ("attention+dense", "engram+attention+moe", "2*attention+moe"),
        description='one entry a layer, "[N*][engram+]MIXER+FEEDFORWARD"; N repeats it',
    )
    residual: str = Field(
        "add",
        description="what a layer reads: add, the sum of all before it; dense_former, a learned sum (arXiv "
        "2402.02622); or one of `components`",
    )
    components: tuple[str, ...] = Field(
        (),
        description="modules or .py files, imported for mixers, feed-forwards and residual schemes of their "
        "own, each with a section [model.NAME]",
    )
    vocab_size: Natural = Field(
        0, description="rows of embedding and head; 0: the tokenizer's entries, more pads them"
    )
    tie_embeddings: bool = Field(False, description="the head uses the embedding's matrix")
    norm_eps: float = Field(1e-6, gt=0, description="added under the root of every RMS norm")
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of embeddings and matrices at initialisation"
    )
    attention: AttentionSettings = AttentionSettings()
    dense: DenseSettings = DenseSettings()
    moe: MoESettings = MoESettings()


class OptimSettings(Section):
    backbone: Literal["adamw", "muon"] = Field(
        "adamw", description="muon takes the 2-D matrices, AdamW the rest"
    )
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(2e-2, gt=0, description="peak learning rate of Muon")
    muon_momentum: Fraction = Field(0.95, description="of Muon, in Nesterov's form")
    beta1: Fraction = Field(0.9, description="decay of AdamW's first moment per step")
    beta2: Fraction = Field(0.95, description="decay of AdamW's second moment per step")
    eps: float = Field(1e-8, gt=0, description="added to the root of AdamW's second moment")
    weight_decay: NonNegative = Field(0.1, description="decoupled; matrices only")
    clip_norm: NonNegative = Field(1.0, description="bound on the global gradient norm; 0 turns clipping off")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="after the warm-up; wsd stays at the peak and decays linearly"
    )
    warmup_steps: Natural = Field(50, description="steps of the linear rise to the peak")
    decay_fraction: Fraction = Field(0.2, description="share of the steps in wsd's decay")
    final_lr_ratio: Fraction = Field(0.1, description="learning rate at the end as a share of the peak")


class TrainSettings(Section):
    steps: Positive = Field(500, description="optimizer steps of the whole run")
    init_from: str = Field(
        "", description="run folder or checkpoint with the weights of a new run; it may lack Engram layers"
    )
    seq_len: Positive = Field(128, description="tokens per sequence")
    global_batch: Positive = Field(
        32, description="sequences per optimizer step over all ranks; no layout changes it"
    )
    micro_batches: Positive = Field(1, description="gradient-accumulation slices of the global batch")
    eval_every: Natural = Field(100, description="steps between validations; 0: only at the end")
    eval_batches: Natural = Field(
        0, description="global batches per validation during the run; 0 and at the end: the whole split"
    )
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the layers' arithmetic; auto: bfloat16 on CUDA, float32 elsewhere. Parameters stay "
        "float32",
    )
    recompute: Recompute = Field(
        "none",
        description="what layers compute again in the backward pass: all but products and attention, or all; "
        "exchanges never",
    )
    compile: bool = Field(
        False,
        description="torch.compile of every layer, between its exchanges and experts; needs a C++ compiler",
    )
    on_spike: SpikeAction = Field(
        "stop",
        description="where a loss is not finite or a spike: end the run, leave the step's update out, or go "
        "back to the last "
        "checkpoint and on behind the batch (docs/reliability.md)",
    )
    spike_score: NonNegative = Field(
        0.0,
        description="robust deviations above the median of the last losses that make a spike; 0: only what "
        "is not finite",
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(
        100, description="losses that a spike is measured against, the last ones"
    )
    spike_limit: Positive = Field(3, description="skips or rollbacks in a row before the run is ended")
    engine: Literal["native", "deepspeed"] = Field(
        "native",
        description="what shards, reduces and updates the backbone: FSDP2, or DeepSpeed's ZeRO "
        "(docs/deepspeed.md)",
    )


class ParallelSettings(Section):
    """Degrees of the axes; -1 takes the ranks that are left. See docs/parallelism.md."""

    pp: Positive = Field(1, description="ranks that the layers are cut over; each has one or several stages")
    schedule: ScheduleName = Field("1f1b", description="order of forward and backward passes under pp")
    stages_per_rank: Natural = Field(
        0, description="0: what the schedule needs, 1 for gpipe and 1f1b, 2 for the others"
    )
    stage_cuts: tuple[Positive, ...] = Field(
        (), description="layers of each stage; []: balanced by parameters and operations"
    )
    dp_replicate: Positive = Field(1, description="copies of the sharded model, each reading other sequences")
    dp_shard: Axis = Field(
        -1,
        description="ranks that parameters are sharded over and that read different sequences; -1: what is "
        "left",
    )
    cp: Positive = Field(1, description="ranks that share a sequence, each with two of its 2*cp chunks")
    tp: Positive = Field(1, description="ranks that share a matrix and, between matrices, a sequence")
    ep: Positive = Field(1, description="ranks that share one set of experts; divides dp_shard * cp * tp")
    etp: Positive = Field(
        1, description="ranks that share the width of an expert: 1, or tp instead of folding experts over it"
    )
    dispatch: Literal["flat", "hierarchical"] = Field(
        "flat",
        description="how tokens reach experts: from rank to rank, or once to each node and from there to its "
        "ranks",
    )
    node_size: Natural = Field(
        0,
        description="neighbouring ranks that hierarchical dispatch takes as a node; 0: the launcher's "
        "LOCAL_WORLD_SIZE",
    )
    mem: Axis = Field(-1, description="ranks that share one copy of the lookup table; -1: all of them")
    mem_placement: MemPlacement = Field(
        "contiguous",
        description="a copy lies on neighbouring ranks, or on ranks spread evenly over stages and nodes",
    )
    zero: Literal[0, 1, 3] = Field(
        1,
        description="what data-parallel ranks cut among themselves: 0 nothing, 1 optimizer state, by whole "
        "parameters, 3 also parameters and gradients (FSDP2)",
    )
    reshard_after_forward: bool = Field(
        False, description="free gathered parameters between forward and backward (ZeRO-3)"
    )
    timeout: Positive = Field(
        300, description="seconds without progress of a rank before the run is ended with who waits for whom"
    )

    def problems(self) -> list[str]:
        if self.reshard_after_forward and self.zero != 3:
            return [
                f"reshard_after_forward=true frees gathered parameters, and with zero={self.zero} none are "
                "gathered; it may be false, or zero 3"
            ]
        return []


class DeepSpeedSettings(Section):
    """Of `train.engine=deepspeed` alone. See docs/deepspeed.md."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what ranks cut among themselves: 0 nothing, 1 optimizer state, 2 also gradients, 3 also "
        "parameters",
    )
    offload_optimizer: bool = Field(False, description="optimizer state and update on the CPU")


class CheckpointSettings(Section):
    every: Natural = Field(100, description="steps between checkpoints; 0: only at the end and on a signal")
    dir: str = Field(
        "", description="folder or fsspec URL that receives them; empty: `checkpoints` in run.dir"
    )
    keep_last: Positive = Field(2, description="latest checkpoints kept")
    keep_every: Natural = Field(0, description="those of every so-many-th step are kept as well; 0: none")
    background: bool = Field(False, description="written while training goes on; at most one at a time")
    table_full_every: Positive = Field(
        1,
        description="one in so many has the whole table, the others the rows that changed since; 1: every "
        "one",
    )
    verify: VerifyLevel = Field(
        "full", description="what is compared before a load: checksums of all files, or sizes"
    )


class KernelSettings(Section):
    """One key for each op of `kernels/ops.py` that has a choice; tests/kernels/test_ops.py compares both."""

    rms_norm: Literal["auto", "torch", "triton", "liger", "apex"] = Field("auto", description="RMS norms")
    swiglu: Literal["auto", "torch", "triton", "liger"] = Field(
        "auto", description="silu(gate) * up of dense layers and experts"
    )
    rope: Literal["auto", "torch", "triton"] = Field(
        "auto", description="rotary positions; triton: with the norm of queries and keys"
    )
    segment_sum: Literal["auto", "torch", "triton"] = Field(
        "auto", description="sums of row gradients at their owner"
    )
    permute: Literal["auto", "torch", "triton"] = Field(
        "auto", description="tokens to experts' order and back"
    )
    cross_entropy: Literal["auto", "torch", "triton"] = Field(
        "auto", description="the loss, with the head where it is one"
    )
    grouped_mlp: Literal["auto", "torch", "triton", "fp8"] = Field(
        "auto",
        description="products of experts with their rows; fp8: Triton's with FP8 operands, but for the "
        "weights' gradient",
    )
    router_topk: Literal["auto", "torch", "triton"] = Field(
        "auto", description="experts, gates and balance sums of a MoE"
    )
    engram_gate: Literal["auto", "torch", "triton"] = Field(
        "auto", description="the gate of an Engram layer, with its norms"
    )
    short_conv: Literal["auto", "torch", "triton"] = Field(
        "auto", description="the convolution of an Engram layer, with its norm"
    )
    row_gather: Literal["auto", "torch", "triton"] = Field(
        "auto", description="rows of the table, and their packing for `wire`"
    )
    rowwise_adam: Literal["auto", "torch", "triton"] = Field("auto", description="the update of touched rows")


class Settings(Section):
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    engram: EngramSettings = EngramSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    kernels: KernelSettings = KernelSettings()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is Settings:
            return super().__reduce_ex__(protocol)
        return _restore, (self.model.components, self.model_dump_json())


@functools.cache
def settings_class(components: tuple[str, ...]) -> type[Settings]:
    """The tree with a section [model.NAME] for each component that has something to set: those of the
    package, and those of these modules.

    Imports the modules. Raises ComponentsError as `Components.load` does.
    """
    there = ModelSettings.model_fields  # which code reads by name has a typed field there
    every = Components.load(components).all
    sections = {c.name: c.section for c in every if c.section.model_fields and c.name not in there}
    if not sections:
        return Settings
    mounted: dict[str, Any] = {name: (section, section()) for name, section in sections.items()}
    model: Any = create_model("ModelSettings", __base__=ModelSettings, **mounted)
    return create_model("Settings", __base__=Settings, model=(model, model()))


def _restore(components: tuple[str, ...], text: str) -> Settings:
    return settings_class(components).model_validate_json(text)
