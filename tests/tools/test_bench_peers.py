"""The peers' benchmark: its arithmetic, and one small run of every subject on two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.model.cost import flops_per_token
from hybridtrain.run.assemble import make_addressing
from hybridtrain.settings.layers import engram_layers
from tools.bench_peers import main, render, summarise
from tools.peer_cases import CASES, Case
from tools.peers import MATMUL_FLOPS, make

SIZES = [
    "--experts",
    "4",
    "--hidden",
    "16",
    "--dim",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--seq-len",
    "16",
    "--batch",
    "4",
    "--vocab",
    "64",
    "--row-width",
    "4",
]
TINY = [*SIZES, "--rounds", "2", "--steps", "1", "--warmup", "0"]

with_peers = pytest.mark.skipif(
    not (find_spec("deepspeed") and find_spec("transformers")), reason="needs the extra bench"
)


def test_ratios_and_shares_are_taken_round_by_round() -> None:
    case = Case(ranks=2, threads=1)

    def answer(seconds: float) -> list[dict[str, float]]:
        return [
            {"seconds": seconds, "cpu": seconds, "bytes": 5e6},
            {"seconds": seconds / 2, "cpu": seconds / 2, "bytes": 5e6},
        ]

    speeds = [1.0, 2.0, 4.0]  # the machine slows down fourfold, no ratio does
    rounds = [
        {"hybridtrain": answer(s), "transformers": answer(1.5 * s), "matmul": answer(s)} for s in speeds
    ]
    result = summarise(case, rounds, steps=2)
    ours, peer = result["subjects"]["hybridtrain"], result["subjects"]["transformers"]
    assert peer["ratio"] == peer["cpu_ratio"] == [1.5, 1.5, 1.5]
    assert ours["tokens_per_second"][0] == pytest.approx(2 * case.batch * case.seq_len / 2.0)
    flops = flops_per_token(case.settings(), case.vocab) * case.batch * case.seq_len
    assert ours["share_of_peak"][0] == pytest.approx(2 * flops / (2 * 2 * MATMUL_FLOPS))
    assert ours["peak_bytes"] == 10e6
    table = render(result)
    assert "| transformers | 1,365 | 1.50 (1.50-1.50) | 1.50 (1.50-1.50) |" in table
    assert "8 experts, top 2, width 512; dim 256, 4 layers" in table
    assert f"{result['machine']['cpu']} (" in table
    assert f"torch {torch.__version__}" in table


def test_a_case_has_the_table_it_asks_for() -> None:
    tables = {}
    for name, case in CASES.items():
        addressing = make_addressing(case.settings(), case.vocabulary())
        tables[name] = addressing.num_rows if addressing is not None else 0
    assert tables.pop("hybrid") == pytest.approx(200_000, rel=0.01)
    assert not any(tables.values())
    assert engram_layers(CASES["hybrid"].settings()) == (0, 2)


def test_a_case_without_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--cases", "8,2,512"])
    assert "choose from small, many, large, hybrid" in capsys.readouterr().err.replace("'", "")


def test_independent_processes_need_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Case(experts=4, hidden=16, dim=32, layers=1, heads=2, seq_len=16, batch=4, vocab=64)
    case = replace(tiny, ranks=2, threads=torch.get_num_threads())
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    step, parameters = make("hybridtrain:independent", case)
    step()
    assert not torch.distributed.is_initialized()
    assert parameters == 2 * 64 * 32 + 32 + 2 * 32 + 4 * 32 * 32 + 4 * 32 + 3 * 4 * 32 * 16


@with_peers
@pytest.mark.parity  # starts every library: a minute
def test_every_subject_trains_the_same_model_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["deepspeed", "transformers:fsdp2", "hybridtrain:independent"]
    # raises where the numbers of parameters differ
    main([*TINY, "--cases", "hybrid", "--rows", "500", "--ranks", "2", "--peers", *peers, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(result["subjects"]) == ["hybridtrain", *peers, "products"]
    assert result["case"]["ranks"] == 2
    assert result["case"]["rows"] == 500
    assert result["machine"]["cores"] > 0
    assert all(s["tokens_per_second"][0] > 0 and s["peak_bytes"] > 1e8 for s in result["subjects"].values())


@with_peers
@pytest.mark.parity  # imports transformers
def test_the_peers_look_up_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.peers import _mixtral

    monkeypatch.setenv("RANK", "0")
    case = Case(4, 2, 16, dim=32, layers=3, heads=2, seq_len=16, batch=2, vocab=64, rows=500, row_width=4)
    addressing = make_addressing(case.settings(), case.vocabulary())
    assert addressing is not None
    assert addressing.layers == (0, 2)
    model = _mixtral(case, "eager", with_router_loss=False)
    tokens = case.tokens()[:, :-1]
    model(input_ids=tokens, labels=tokens).loss.backward()
    used = model.table.weight.grad.abs().sum(1).nonzero().flatten()
    ids = row_ids(addressing, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(used, ids[:, :-1].unique())  # the last token of a sequence predicts nothing


@with_peers
@pytest.mark.parity
def test_a_subject_that_dies_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)transformers:no_such_way died:.*no_such_way"):
        main([*TINY, "--cases", "small", "--peers", "transformers:no_such_way"])
