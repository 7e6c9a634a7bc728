"""The target of a reshard: its settings, layout and vocabulary, or every reason why it is impossible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain import checkpoint
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import UserError
from hybridtrain.parallel.layout import Layout
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.run_folder import ADDRESSING
from hybridtrain.settings.layers import engram_layers, layer_specs
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.tree import DataSettings, Settings

BESIDE_EXPERTS = ("top_k", "num_groups", "top_groups", "gate_scale")
"""Of model.moe: what may change with the number of experts, so that the copies are chosen together."""


@dataclass(frozen=True)
class Growth:
    """What is added to the model; None: nothing. `router_noise` is relative to the root mean square of a
    router row.

    `tokenizer`: a tokenizer.json in the place of the run's (tokens.py).
    """

    experts: int | None = None
    vocab: int | None = None
    router_noise: float = 0.0
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Target:
    settings: Settings
    layout: Layout
    vocab_size: int


def plan_target(
    info: dict[str, Any], out: Path, overrides: Sequence[str], nproc: int | None, growth: Growth
) -> Target:
    """The target of the checkpoint with the description `info`. `nproc` None: as few ranks as the axes need.

    Raises SettingsError or LayoutError as a run would, and UserError listing everything that would make
    another model of it.
    """
    before = parse_settings(info["settings"], source="the checkpoint's settings")
    ours = [f"run.dir={json.dumps(str(out))}", 'checkpoint.dir=""']
    if growth.experts is not None:
        ours.append(f"model.moe.num_experts={growth.experts}")
    if growth.vocab is not None:
        ours.append(f"model.vocab_size={growth.vocab}")
    if growth.tokenizer is not None:
        ours += _beside_tokenizer(before, out)
    settings = parse_settings(before.model_dump(mode="json"), [*overrides, *ours], source="overrides")
    problems = _growth_problems(info, before, growth)
    taken = ("run.dir", "checkpoint.dir")
    problems += [
        f"{override}: the target is {out}" for override in overrides if override.partition("=")[0] in taken
    ]
    problems += _other_model(before, settings, growth)
    if problems:
        raise UserError("\n".join([f"{out}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    layout = resolve_layout(settings, nproc if nproc is not None else _fewest_ranks(settings))
    return Target(settings, layout, growth.vocab or info["vocab_size"])


def _beside_tokenizer(before: Settings, out: Path) -> list[str]:
    """Settings of a run with a tokenizer of its own: data are made with it, and the table is addressed as it
    was.
    """
    ours = [
        f"data.tokenizer={json.dumps(str(out / TOKENIZER))}",
        f"data.vocab_size={DataSettings().vocab_size}",
    ]
    return ours + (
        [f"engram.addressing={json.dumps(str(out / ADDRESSING))}"] if engram_layers(before) else []
    )


def _growth_problems(info: dict[str, Any], before: Settings, growth: Growth) -> list[str]:
    experts, out = before.model.moe.num_experts, []
    if growth.experts is not None and all(spec.feedforward != "moe" for spec in layer_specs(before)):
        out.append(f"--grow-experts {growth.experts}: no layer of model.layers is moe")
    elif growth.experts is not None and growth.experts <= experts:
        out.append(
            f"--grow-experts {growth.experts}: the model has {experts}, and none can be taken away; it may "
            "be more"
        )
    if growth.router_noise and growth.experts is None:
        out.append(f"--router-noise {growth.router_noise} without --grow-experts")
    if growth.vocab is not None and growth.vocab <= info["vocab_size"]:
        out.append(
            f"--extend-vocab {growth.vocab}: the model has {info['vocab_size']} tokens, and none can be "
            "taken away; it may be more"
        )
    return out


def _other_model(before: Settings, after: Settings, growth: Growth) -> list[str]:
    """Overrides that change what the model is, each with the reason why files alone cannot follow."""
    ours, theirs = checkpoint.identity(after), checkpoint.identity(before)
    allowed = (
        {f"model.moe.{key}" for key in ("num_experts", *BESIDE_EXPERTS)}
        if growth.experts is not None
        else set()
    )
    out = []
    for key in dict.fromkeys([*theirs, *ours]):
        if ours.get(key) != theirs.get(key) and key not in allowed:
            changed = f"{key}={json.dumps(ours.get(key))}: the checkpoint has {json.dumps(theirs.get(key))}"
            out.append(f"{changed}; {_reason(key)}")
    if before.model.vocab_size != after.model.vocab_size and growth.vocab is None:
        out.append(
            f"model.vocab_size={after.model.vocab_size}: the checkpoint has {before.model.vocab_size}; use "
            "--extend-vocab"
        )
    return out


def _reason(key: str) -> str:
    if key == "model.moe.num_experts":
        return "use --grow-experts to add copies of experts"
    if key.startswith("model.moe.") and key.rpartition(".")[2] in BESIDE_EXPERTS:
        return "another choice of experts is another model; it may change with --grow-experts only"
    if key.startswith("engram."):
        return "rows are found by their hash under these numbers, and would be other n-grams' rows"
    if key == "optim.backbone":
        return "its state cannot be made of the other optimizer's; start a new run with train.init_from"
    return "another model; weights of one are not those of the other"


def _fewest_ranks(settings: Settings) -> int:
    """The product of the axes that are given; where dp_shard is -1, with as few ranks of it as ep needs."""
    parallel = settings.parallel
    inner = parallel.cp * parallel.tp
    folded = parallel.cp * (parallel.tp if parallel.etp == 1 else 1)
    shard = max(1, -(-parallel.ep // folded)) if parallel.dp_shard == -1 else parallel.dp_shard
    least = parallel.pp * parallel.dp_replicate * inner * shard
    return max(least, parallel.mem) if parallel.dp_shard == -1 and parallel.mem % least == 0 else least
