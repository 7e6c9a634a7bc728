"""Settings of several sections that contradict each other. Checks that depend on the number of ranks are in
`Layout` (parallel/layout.py).
"""

from __future__ import annotations

import math

from hybridtrain.choices import ScheduleName
from hybridtrain.model.registry import Components
from hybridtrain.section import Section, divisors_of
from hybridtrain.settings.layers import LayerSpec, layer_specs
from hybridtrain.settings.tree import DataSettings, ParallelSettings, Settings

WHOLE_BACKWARD: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved")
"""Schedules that take a micro-batch back through a stage at once, inputs and weights together."""


def contradictions(s: Settings) -> list[str]:
    """Every way in which the sections do not fit each other, one line each with the nearest legal value."""
    out: list[str] = []
    specs: tuple[LayerSpec, ...] = ()
    try:
        specs = layer_specs(s)
    except ValueError as error:
        out.append(str(error))
    if s.model.residual not in (known := Components.load(s.model.components).residuals):
        out.append(f'model.residual="{s.model.residual}" is not known; it may be {" or ".join(known)}')
    if not s.model.layers:
        out.append("model.layers is empty; a model needs at least one layer")
    out += section_problems(s)
    out += unfit_widths(s, 2 if s.train.precision == "bfloat16" else 4) if specs else []
    out += _useless_steps(s, any(spec.engram for spec in specs))
    out += [*_unfit_engram(s), *_unfit_training(s), *_unfit_pipeline(s)]
    if s.train.engine == "deepspeed":
        out += _beyond_deepspeed(s)
    return out + _given_twice(s.data)


def _unfit_engram(s: Settings) -> list[str]:
    """Settings of the Engram layers and their table that do not go together."""
    engram = s.engram
    out: list[str] = []
    if s.train.micro_batches % engram.exchange_groups:
        out.append(
            f"engram.exchange_groups={engram.exchange_groups} does not divide "
            f"train.micro_batches={s.train.micro_batches}; it may be {divisors_of(s.train.micro_batches)}"
        )
    if engram.fetch == "overlap" and engram.optimizer == "adam":
        out.append(
            'engram.fetch="overlap" needs rows that an update leaves alone, and engram.optimizer="adam" '
            'changes all; it may be "step" or "stale"'
        )
    if engram.dtype == "bfloat16" and engram.optimizer == "adam":
        out.append(
            'engram.dtype="bfloat16" needs an optimizer that rounds stochastically; engram.optimizer may be '
            '"rowwise_adam" or "rowwise_adagrad", or engram.dtype "float32"'
        )
    if engram.fetch == "stale" and engram.exchange_groups > 1:
        out.append(
            f'engram.exchange_groups={engram.exchange_groups}: engram.fetch="stale" reads all rows of a step '
            "at once; it may be 1"
        )
    if s.checkpoint.table_full_every > 1 and engram.optimizer == "adam":
        out.append(
            f"checkpoint.table_full_every={s.checkpoint.table_full_every} saves the rows that changed, and "
            'engram.optimizer="adam" changes all; it may be 1'
        )
    return out


def _unfit_training(s: Settings) -> list[str]:
    """Batches, spikes and compilation."""
    out: list[str] = []
    if s.train.global_batch % s.train.micro_batches:
        out.append(
            f"train.micro_batches={s.train.micro_batches} does not divide "
            f"train.global_batch={s.train.global_batch}; it may be {divisors_of(s.train.global_batch)}"
        )
    if s.train.on_spike != "stop" and s.train.engine == "deepspeed":
        out.append(
            f'train.on_spike="{s.train.on_spike}": DeepSpeed keeps the gradients of a step that is not made; '
            'with train.engine="deepspeed" it may be "stop"'
        )
    if s.train.on_spike == "rollback" and s.checkpoint.every == 0:
        out.append(
            'train.on_spike="rollback" goes back to checkpoints, and checkpoint.every=0 writes none; set it '
            "above 0"
        )
    if s.train.compile and s.train.recompute == "selective":
        out.append(
            "train.recompute=selective: the products inside compiled layers are not seen; it may be none or "
            "full, or train.compile=false"
        )
    return out


def _unfit_pipeline(s: Settings) -> list[str]:
    """Settings that do not go with a pipeline, or not with every schedule."""
    engram, parallel = s.engram, s.parallel
    out: list[str] = []
    if parallel.pp == 1:
        return out
    if engram.exchange_groups > 1:
        out.append(
            f"engram.exchange_groups={engram.exchange_groups}: a pipeline needs the rows of all "
            "micro-batches at once; it may be 1"
        )
    if parallel.reshard_after_forward and parallel.schedule not in ("gpipe", "1f1b"):
        out.append(
            "parallel.reshard_after_forward=true frees parameters that "
            f"parallel.schedule={parallel.schedule} still needs; it may be false, or parallel.schedule gpipe "
            "or 1f1b"
        )
    if s.train.recompute != "none" and parallel.schedule not in WHOLE_BACKWARD:
        out.append(
            f"train.recompute={s.train.recompute}: parallel.schedule={parallel.schedule} goes back through a "
            "layer in parts and would run it again for each; it may be none, or parallel.schedule one of "
            f"{', '.join(WHOLE_BACKWARD)}"
        )
    if s.train.compile and parallel.schedule not in WHOLE_BACKWARD:
        out.append(
            f"train.compile=true: parallel.schedule={parallel.schedule} goes back through a layer in parts, "
            "and a compiled layer does all of it each time and may overwrite what the next needs; it may be "
            f"false, or parallel.schedule one of {', '.join(WHOLE_BACKWARD)}"
        )
    return out


def section_problems(section: Section, prefix: str = "") -> list[str]:
    """The problems that the section and those inside it report, with whole keys."""
    out = [f"{prefix}{problem}" for problem in section.problems()]
    for name in type(section).model_fields:
        if isinstance(inner := getattr(section, name), Section):
            out += section_problems(inner, f"{prefix}{name}.")
    return out


def _given_twice(data: DataSettings) -> list[str]:
    """Settings of which one makes the other meaningless. Written-out settings have all defaults, which say
    nothing.
    """
    out, default = [], DataSettings()
    if data.tokenizer and data.vocab_size != default.vocab_size:
        out.append(
            "data.vocab_size and data.tokenizer are both given; a loaded tokenizer has its own vocabulary, "
            "leave one out"
        )
    if data.validation and data.validation_fraction not in (0.0, default.validation_fraction):
        out.append(
            "data.validation_fraction and data.validation are both given; either is held out, leave one out"
        )
    return out


def notices(s: Settings) -> list[str]:
    """What the settings allow and hardly anybody wants, one line each; told before the first step."""
    out: list[str] = []
    steps, optim, saves = s.train.steps, s.optim, s.checkpoint
    if optim.warmup_steps >= steps:
        out.append(
            f"optim.warmup_steps={optim.warmup_steps} with train.steps={steps}: the learning rate only "
            f"rises, to {steps / optim.warmup_steps:.0%} of its peak at the last step"
        )
    elif optim.schedule == "wsd" and round(optim.decay_fraction * steps) > steps - optim.warmup_steps:
        out.append(
            f"optim.decay_fraction={optim.decay_fraction:g} of train.steps={steps} begins within the "
            f"warm-up: the decay has the {steps - optim.warmup_steps} steps that "
            f"optim.warmup_steps={optim.warmup_steps} leaves"
        )
    if s.train.eval_every > steps:
        out.append(
            f"train.eval_every={s.train.eval_every} with train.steps={steps}: validation at the end only"
        )
    if saves.every > steps:
        out.append(f"checkpoint.every={saves.every} with train.steps={steps}: a checkpoint at the end only")
    if saves.every and saves.keep_every % saves.every:
        out.append(
            f"checkpoint.keep_every={saves.keep_every} is not a multiple of checkpoint.every={saves.every}: "
            f"kept for good is the checkpoint of every {math.lcm(saves.keep_every, saves.every)}th step"
        )
    if s.train.spike_score and s.train.spike_window >= steps:
        out.append(
            f"train.spike_window={s.train.spike_window} with train.steps={steps}: no loss is judged to be a "
            "spike"
        )
    return out


def _useless_steps(s: Settings, has_table: bool) -> list[str]:
    """Running means that never move, and decays: decoupled, they multiply weights by 1 - rate * decay, which
    must stay above 0.
    """
    optim, engram = s.optim, s.engram
    means = ("beta1", "beta2", "muon_momentum") if optim.backbone == "muon" else ("beta1", "beta2")
    out = [
        f"optim.{key}=1.0 would never take in a gradient; it may be below 1"
        for key in means
        if getattr(optim, key) == 1.0
    ]
    rules = [("optim.lr", optim.lr, "optim.weight_decay", optim.weight_decay)]
    if optim.backbone == "muon":
        rules.append(("optim.muon_lr", optim.muon_lr, "optim.weight_decay", optim.weight_decay))
    if has_table:
        table = optim.lr * engram.lr_multiplier
        rules.append(("optim.lr * engram.lr_multiplier", table, "engram.weight_decay", engram.weight_decay))
    return out + [
        f"{rate_key} * {decay_key} = {rate:g} * {decay:g} = {rate * decay:g} turns weights to zero or round "
        f"in one step; {decay_key} may be below {1 / rate:g}"
        for rate_key, rate, decay_key, decay in rules
        if rate * decay >= 1.0
    ]


def unfit_widths(s: Settings, bytes_per_element: int) -> list[str]:
    """Widths of experts that grouped products cannot take in elements of this size: rows must be multiples of
    16 bytes.
    """
    step = 16 // bytes_per_element
    if not any(spec.feedforward == "moe" for spec in layer_specs(s)):
        return []
    return [
        f"{key}={width} is not a multiple of {step}, as grouped products need (rows of 16 bytes); "
        f"the next is {-(-width // step) * step}"
        for key, width in (("model.dim", s.model.dim), ("model.moe.hidden", s.model.moe.hidden))
        if width % step
    ]


def _beyond_deepspeed(s: Settings) -> list[str]:
    """Settings that DeepSpeed does not support with this model, or would silently compute wrong
    (docs/deepspeed.md).
    """
    engine, out = "train.engine=deepspeed", []
    for axis in ("pp", "tp", "etp", "dp_replicate"):
        if (degree := getattr(s.parallel, axis)) > 1:
            out.append(
                f"parallel.{axis}={degree} with {engine}, which spreads over dp_shard, cp, ep and mem; "
                f"{axis} may be 1"
            )
    if s.parallel.zero != ParallelSettings().zero:
        out.append(
            f"parallel.zero={s.parallel.zero} with {engine}, which has deepspeed.zero_stage; it may be "
            f"{ParallelSettings().zero}"
        )
    if s.optim.backbone != "adamw":
        out.append(
            f"optim.backbone={s.optim.backbone} with {engine}, whose flat parts of parameters are no "
            "matrices; it may be adamw"
        )
    if s.train.precision == "bfloat16":
        out.append(
            f"train.precision=bfloat16 with {engine}, which computes in its parameters' float32; it may be "
            "auto or float32"
        )
    if s.parallel.ep > 1 and s.deepspeed.zero_stage == 3:
        out.append(
            f"deepspeed.zero_stage=3 with parallel.ep={s.parallel.ep} would add up different experts of "
            "different ranks; zero_stage may be 0, 1 or 2, or ep may be 1"
        )
    if s.deepspeed.offload_optimizer and s.deepspeed.zero_stage == 0:
        out.append(
            "deepspeed.offload_optimizer=true with deepspeed.zero_stage=0, which cuts nothing; zero_stage "
            "may be 1, 2 or 3"
        )
    if s.train.init_from:
        out.append(
            "train.init_from: DeepSpeed keeps copies of the weights that would not be filled; "
            "start with train.engine=native, and go on with --resume train.engine=deepspeed"
        )
    return out
