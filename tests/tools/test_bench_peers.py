"""The peers' benchmark: its arithmetic, and one small run of every subject on two ranks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from hybridtrain.model.cost import flops_per_token
from tools.bench_peers import main, render, summarise
from tools.peers import MATMUL_FLOPS, Case

SIZES = [
    "--cases",
    "4,2,16",
    "--dim",
    "32",
    "--layers",
    "1",
    "--heads",
    "2",
    "--seq-len",
    "16",
    "--batch",
    "4",
    "--vocab",
    "64",
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
    assert "| transformers | 1,365 | 1.50 (1.50-1.50) | 1.50 (1.50-1.50) |" in render(result)


@with_peers
@pytest.mark.parity  # starts every library: half a minute
def test_every_subject_trains_the_same_model_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [*TINY, "--ranks", "2", "--peers", "deepspeed", "--json"]
    )  # in Mixtral of transformers; raises where the numbers of parameters differ
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(result["subjects"]) == ["hybridtrain", "deepspeed", "products"]
    assert result["case"]["ranks"] == 2
    assert all(s["tokens_per_second"][0] > 0 and s["peak_bytes"] > 1e8 for s in result["subjects"].values())


@with_peers
@pytest.mark.parity
def test_a_subject_that_dies_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)transformers:no_such_way died:.*no_such_way"):
        main([*TINY, "--peers", "transformers:no_such_way"])
