"""megatron-core's own GPT model, on CPU ranks of this machine: what it saves, what it loads, its logits.

`python -m tests.hybridtrain.formats.megatron_core RANK WORLD FOLDER` works off `FOLDER/jobs.pt`, a list of
Job; logits go to `FOLDER/NAME.pt`. It imports nothing of hybridtrain. Layers are of torch (Megatron's `local`
specification); with `transformer_impl="transformer_engine"` their tensors have the names that Transformer
Engine's layers have.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[3]
TE_ONLY = ("core_attention._extra_state", "layernorm._extra_state")  # states that layers of torch do not have


@dataclass(frozen=True)
class Job:
    """`args` of Megatron-LM: make a random model and save it to `folder`; None: load `folder`, with every key
    accounted for.

    apart: with `singleton_local_shards`. layouts: then written again by ranks that share it, to a folder of
    each name.
    """

    name: str
    folder: Path
    args: Namespace | None = None
    apart: bool = False
    layouts: tuple[str, ...] = ()


LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "etp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def run(jobs: list[Job], tokens_BT: Tensor, folder: Path, world: int = 2) -> dict[str, dict[str, Any]]:
    """What each job gave, by its name: `logits`, and `noise`, how far they are from the model's own in
    float64.
    """
    torch.save((jobs, tokens_BT), folder / "jobs.pt")
    command = [sys.executable, "-m", __name__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                arguments = [str(rank), str(world), str(folder)]
                ranks.append(
                    subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stderr=stream)
                )
        status = [rank.wait(timeout=250) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(status), "\n".join(log.read_text() for log in logs)
    return {job.name: torch.load(folder / f"{job.name}.pt") for job in jobs}


def main(rank: int, world: int, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    from megatron.core import dist_checkpointing, parallel_state

    without_cuda()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world
    )
    jobs, tokens_BT = torch.load(folder / "jobs.pt", weights_only=False)
    for job in jobs:
        spread(parallel_state)
        common = {} if job.args else dist_checkpointing.load_common_state_dict(str(job.folder))
        args = job.args or common["args"]
        model = make_model(args)
        if job.args:
            fill(model)
            save(model, job.folder, args, {"singleton_local_shards": job.apart})
        else:
            load(model, job.folder, common["content_metadata"], args)
        logits, noise = use(model, tokens_BT)
        if rank == 0:
            torch.save({"logits": logits, "noise": noise}, folder / f"{job.name}.pt")
        for layout in job.layouts:
            spread(parallel_state, **LAYOUTS[layout])
            part = make_model(args, **LAYOUTS[layout])
            load(part, job.folder, {"singleton_local_shards": job.apart}, args)
            save(part, job.folder.with_name(layout), args, {"singleton_local_shards": job.apart})
    dist.destroy_process_group()


def without_cuda() -> None:
    """Stand-ins for what megatron-core asks of CUDA by name where it need not."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    random.CudaRNGStatesTracker.fork = lambda *_: (
        contextlib.nullcontext()
    )  # nothing is random in a forward pass
    moe_utils.te_general_gemm = None  # not defined in 0.16.1 without Transformer Engine, and asked for


def spread(parallel_state: Any, **degrees: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**degrees)


def make_model(args: Namespace, **degrees: int) -> Any:
    """As Megatron-LM makes it of its arguments (`core_transformer_config_from_args`, gpt_builders.py)."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert args.swiglu
    values = {
        key: value for key, value in vars(args).items() if key in TransformerConfig.__dataclass_fields__
    }
    values |= {
        "num_moe_experts": getattr(args, "num_experts", None),
        "layernorm_epsilon": args.norm_epsilon,
    } | degrees
    values |= {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
    }
    values |= {"moe_grouped_gemm": False, "use_cpu_initialization": True, "params_dtype": torch.float32}
    values |= {"masked_softmax_fusion": False, "bias_dropout_fusion": False, "persist_layer_norm": False}
    values |= {
        "gradient_accumulation_fusion": False,
        "moe_router_load_balancing_type": "none",
        "pipeline_dtype": torch.float32,
    }
    if not args.group_query_attention:
        values["num_query_groups"] = None
    config = TransformerConfig(**values)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    if args.transformer_impl == "transformer_engine":
        for layer in spec.layer_specs:
            if config.num_moe_experts and layer.submodules.mlp.module.__name__ == "MoELayer":
                layer.submodules.sharded_state_dict_keys_map.pop(
                    "pre_mlp_layernorm.", None
                )  # layers share it
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    ).eval()


def fill(model: Any) -> None:
    """Random weights of which none is zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value is not None:
                noise = torch.empty(value.shape).normal_(0, 0.15, generator=generator)
                value.copy_(1 + noise if "norm" in name else noise)


def save(model: Any, folder: Path, args: Namespace, metadata: dict[str, bool]) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.sharded_state_dict(metadata=dict(metadata)),
        "args": args,
        "iteration": 3,
        "checkpoint_version": 3.0,
    }
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)


def load(model: Any, folder: Path, metadata: dict[str, bool], args: Namespace) -> None:
    from megatron.core import dist_checkpointing

    wanted = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    state, not_wanted, not_there = dist_checkpointing.load(wanted, str(folder), strict="return_all")
    if args.transformer_impl == "transformer_engine":
        not_wanted = {key for key in not_wanted if not any(only in key for only in TE_ONLY)}
    assert not not_there, f"not in the checkpoint: {not_there}"
    assert not not_wanted, f"not in the model: {not_wanted}"
    model.load_state_dict(state["model"])


def use(model: Any, tokens_BT: Tensor) -> tuple[Tensor, float]:
    length = tokens_BT.size(1)
    positions_BT = torch.arange(length).expand_as(tokens_BT)
    mask_11TT = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        logits = model(tokens_BT, positions_BT, mask_11TT)
        exact = model.double()(tokens_BT, positions_BT, mask_11TT)
    return logits, float((logits - exact).abs().max())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
