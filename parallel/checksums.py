"""Checksums of what is exchanged (`engram.checksum`): every part is proved to arrive as it was sent."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from hybridtrain.parallel.collectives import Group, exchange_counts


class ExchangeError(RuntimeError):
    """A row id or a payload arrived wrong: the message names group, ranks and numbers. To go on would corrupt
    the table.
    """


def verify(sums: Tensor, out: Tensor, receive: list[int], group: Group, what: str) -> None:
    """Raise ExchangeError where `out` does not have the checksums that its senders tell; `sums` are those of
    what was sent here.
    """
    if group.size == 1:
        return
    wrong = (exchange_counts(sums, group) != checksums(out, receive)).nonzero().flatten().tolist()
    if wrong:
        senders = ", ".join(str(group.ranks[i]) for i in wrong)
        raise ExchangeError(
            f"{what} from rank {senders} arrived damaged at rank {group.ranks[group.rank]} (group "
            f"{group.name})"
        )


def checksums(x: Tensor, splits: list[int]) -> Tensor:
    """One int64 per split: its bytes, each times an odd number that depends on its place, summed mod 2^64."""
    words = x.reshape(len(x), prod(x.shape[1:])).contiguous().view(torch.uint8).to(torch.int64) + 1
    per_row = (words * (torch.arange(words.shape[1], device=x.device) * 2 + 1)).sum(1)
    return torch.stack(
        [(part * (torch.arange(len(part), device=x.device) * 2 + 1)).sum() for part in per_row.split(splits)]
    )
