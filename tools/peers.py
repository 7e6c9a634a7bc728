"""The subjects of bench_peers.py: a MoE language model as hybridtrain, transformers and DeepSpeed train it,
and its products alone.

A subject is a function from a case to (step, parameters): something to call that trains one step, and how
many parameters the whole model has, by which the models are compared; None where there is no model. It runs
in a process of its own, one a rank, that does as many steps as it is told on its standard input and answers
with the seconds; first it answers with the number of parameters. Every step has the same batch of random
tokens, in which hardly an n-gram occurs twice.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.model.build import frame_of
from hybridtrain.model.engram import EngramLayer
from hybridtrain.model.exchanges import LOCAL
from hybridtrain.model.feedforwards.dense import SwiGLU
from hybridtrain.monitor.clock import Clock
from hybridtrain.run.assemble import assemble, make_addressing
from hybridtrain.run.process_setup import join_world, keep_freed_memory
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.layers import engram_layers
from tools.peer_cases import AUX_WEIGHT, CLIP_NORM, LEARNING_RATE, Case

Step = Callable[[], object]
Made = tuple[Step, int | None]


WORLD_OF_ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def hybridtrain(case: Case, experts: str = "sharded") -> Made:
    """The project's own step, as its loop runs it; `experts` as in `Case.settings`, or "independent".

    Independent: each process trains its share of the batch as a run of its own, with the whole model and no
    process group, beside the others. What ranks lose to each other is the time of "sharded" over this one's.
    The work per token is the same; each independent process updates all experts, and a rank its own.

    The plan of the table's rows is made in the step here; in training it is made beside the step before.
    """
    tokens = case.tokens()[None]
    if experts == "independent":
        os.environ.update(WORLD_OF_ONE)
        case, experts = replace(case, ranks=1, batch=case.batch // case.ranks), "sharded"
    settings, vocabulary = case.settings(experts), case.vocabulary()
    addressing = make_addressing(settings, vocabulary)
    run = assemble(settings, join_world(settings), vocabulary, addressing)
    parameters = sum(p.numel() for p in run.model.parameters())
    if addressing is not None:
        parameters += addressing.num_rows * case.row_width
    batch = Batch(
        tokens[..., :-1].contiguous(),
        tokens[..., 1:].contiguous(),
        torch.zeros_like(tokens[..., 1:], dtype=torch.bool),
    )
    hooks = Hooks(Clock(torch.device("cpu")).phase)

    def step() -> None:
        plan = run.table.plan(batch) if run.table is not None else None
        train_step(run, 100, StepInput(batch, plan), hooks)

    return step, parameters


def transformers(case: Case, experts: str = "grouped_mm") -> Made:
    """Mixtral of transformers: SDPA, fused AdamW; over ranks DDP, whose gradients are views of its buckets.
    `experts` is how it runs them: grouped_mm, batched_mm, eager; "fsdp2" is grouped_mm under FSDP2, layer by
    layer, as torchtitan applies it.
    """
    sharded = experts == "fsdp2"
    model: Any = _mixtral(case, "grouped_mm" if sharded else experts, with_router_loss=True)
    parameters = sum(p.numel() for p in model.parameters())
    if case.ranks > 1:
        dist.init_process_group("gloo")
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer, reshard_after_forward=False)
            fully_shard(model, reshard_after_forward=False)
        else:
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    tokens = case.tokens()[:, :-1].contiguous()
    return _torch_step(model, lambda: model(input_ids=tokens, labels=tokens).loss, lambda: None), parameters


def deepspeed(case: Case) -> Made:
    """DeepSpeed's MoE layer, without drops, in the same Mixtral; experts over all ranks, AdamW of torch as
    for the others.

    Without DeepSpeed's engine, which adds work at every step and nothing to what is measured here: the
    gradients of what is not an expert are summed in one all-reduce.
    """
    import deepspeed as library
    from deepspeed.moe.layer import MoE

    library.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # would be compiled on first use, for minutes; gloo does
    )
    library.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = _mixtral(case, "eager", with_router_loss=False)
    moes = []
    for layer in model.model.layers:
        expert = SwiGLU(case.dim, case.hidden)
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.02)
        moe = MoE(
            case.dim,
            expert,
            case.experts,
            case.ranks,
            k=case.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        moe.set_deepspeed_parallelism()
        moes.append(moe)
        layer.mlp = _First(moe)
    shared = [p for p in model.parameters() if getattr(p, "allreduce", True)]
    num_shared, num_here = (sum(p.numel() for p in parameters) for parameters in (shared, model.parameters()))
    tokens = case.tokens()[:, :-1].contiguous()

    def loss() -> Tensor:
        out = model(input_ids=tokens, labels=tokens).loss
        for moe in moes:
            out = out + AUX_WEIGHT / case.layers * moe.deepspeed_moe.l_aux
        return out

    def reduce() -> None:
        if case.ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in shared if p.grad is not None]).div_(case.ranks)
            dist.all_reduce(flat)
            torch._foreach_copy_(
                [p.grad.view(-1) for p in shared if p.grad is not None],
                flat.split([p.numel() for p in shared if p.grad is not None]),
            )

    return _torch_step(model, loss, reduce), num_shared + case.ranks * (num_here - num_shared)


def matmul(case: Case) -> Made:
    """A large product, 2048 x 1024 by 1024 x 1024, on each rank: the peak that shares refer to. MATMUL_FLOPS
    operations.
    """
    a, b, out = torch.randn(2048, 1024), torch.randn(1024, 1024), torch.empty(2048, 1024)

    def step() -> None:
        for _ in range(MATMUL_TIMES):
            torch.mm(a, b, out=out)

    return step, None


MATMUL_TIMES = 8
MATMUL_FLOPS = 2.0 * 2048 * 1024 * 1024 * MATMUL_TIMES


def products(case: Case) -> Made:
    """Only the step's weight products, forward and backward, of evenly loaded experts, into buffers that are
    there: what no trainer on these products can go below."""
    tokens, width = case.batch // case.ranks * case.seq_len, case.dim
    shapes = [(tokens, width, width)] * 4 * case.layers + [(tokens, width, case.vocab)]
    load = tokens * case.top_k // case.experts
    shapes += (
        [(load, width, case.hidden), (load, width, case.hidden), (load, case.hidden, width)]
        * case.experts
        * case.layers
    )
    settings = case.settings()
    looked_up = settings.engram.slots * case.row_width
    shapes += [(tokens, looked_up, width)] * 2 * len(engram_layers(settings))
    made: dict[tuple[int, int, int], list[Tensor]] = {}
    for m, k, n in shapes:
        made.setdefault((m, k, n), [torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)])
    weights = [torch.randn(k, n) for _, k, n in shapes]

    def step() -> None:
        for shape, w in zip(shapes, weights, strict=True):
            x, grad_w, y = made[shape]
            torch.mm(x, w, out=y)
            torch.mm(y, w.t(), out=x)
            torch.mm(x.t(), y, out=grad_w)
            y.zero_()
            x.zero_()

    return step, None


class _First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)[0]
        return out


def _mixtral(case: Case, experts: str, with_router_loss: bool) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=case.vocab,
        hidden_size=case.dim,
        intermediate_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        max_position_embeddings=case.seq_len,
        output_router_logits=with_router_loss,
        router_aux_loss_coef=AUX_WEIGHT,
        sliding_window=None,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    model = MixtralForCausalLM(config)
    if case.rows:
        add_engram(model, case)
    return model.train()


def add_engram(model: Any, case: Case) -> None:
    """Give Mixtral hybridtrain's Engram layers where hybridtrain's model has them. The row ids are computed
    from the tokens in every forward pass.

    The layers are this project's own; the table is a plain `nn.Embedding`, looked up in each layer: its
    gradient, its update and, under DDP, its all-reduce are as large as the table.
    """
    settings = case.settings()
    addressing = make_addressing(settings, case.vocabulary())
    assert addressing is not None
    model.table = nn.Embedding(addressing.num_rows, case.row_width)
    nn.init.normal_(model.table.weight, std=settings.engram.init_std)
    ids: dict[int, Tensor] = {}

    def address(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"]
        ids_BTLS = row_ids(addressing, tokens, torch.zeros_like(tokens, dtype=torch.bool))
        ids.update(zip(addressing.layers, ids_BTLS.unbind(2), strict=True))

    def add(layer: Any, number: int) -> None:
        layer.engram = EngramLayer(settings.engram, frame_of(settings), LOCAL)
        for linear in (layer.engram.wk, layer.engram.wv):
            nn.init.normal_(linear.weight, std=settings.model.init_std)
        nn.init.zeros_(layer.engram.conv)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            h, *others = args
            return (h + layer.engram(h, model.table(ids[number]), None), *others)

        layer.register_forward_pre_hook(before)

    model.register_forward_pre_hook(address, with_kwargs=True)
    for number in addressing.layers:
        add(model.model.layers[number], number)


def _torch_step(model: nn.Module, loss: Callable[[], Tensor], reduce: Step) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        loss().backward()
        reduce()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


SUBJECTS: dict[str, Callable[..., Made]] = {
    "hybridtrain": hybridtrain,
    "transformers": transformers,
    "deepspeed": deepspeed,
    "matmul": matmul,
    "products": products,
}


def make(name: str, case: Case) -> Made:
    """The subject called `name`; what stands behind a colon is handed to it, as in transformers:eager."""
    kind, _, variant = name.partition(":")
    return SUBJECTS[kind](case, *([variant] if variant else []))


def serve(name: str, case: Case) -> None:
    """Answer each line on standard input, a number of steps, with a line of JSON: seconds, CPU seconds and
    peak memory in bytes.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    torch.set_num_threads(case.threads)
    keep_freed_memory()  # all subjects alike, as hybridtrain does by itself
    step, parameters = make(name, case)
    step()
    answers.write(f"{json.dumps(parameters)}\n")
    answers.flush()
    for line in sys.stdin:
        if dist.is_initialized():
            dist.barrier()
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps({"seconds": seconds, "cpu": cpu_seconds, "bytes": peak}) + "\n")
        answers.flush()
    os._exit(0)  # nothing of a process group may keep the process


def to_json(case: Case) -> str:
    return json.dumps(asdict(case))


if __name__ == "__main__":
    serve(sys.argv[1], Case(**json.loads(sys.argv[2])))
