"""Row ids on whole batches of tokens, in torch and on any device; equals reference.py bit for bit.

Shapes: … any leading dims, N = their product times T, L Engram layers, O orders, K heads, S = O * K slots.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hybridtrain.kernels.choose import Op
from hybridtrain.kernels.engram_hash.addressing import Addressing

# not chosen: the CPU makes the ids ahead of their step
ENGRAM_HASH = Op("engram_hash", "torch int64", ("torch",), sources=("engram_hash.kernel",), has_key=False)


def row_ids(addressing: Addressing, tokens: Tensor, starts: Tensor) -> Tensor:
    """Row ids int64 [..., T, L, S] in the packed table of all Engram layers, each in [0, num_rows).

    tokens int64 [..., T]; starts bool [..., T] is True where a document starts. The left edge of a window
    always bounds n-grams. Raises ValueError where the shapes differ, and IndexError (on CPU) for a token
    outside the vocabulary.
    """
    if tokens.shape != starts.shape or tokens.ndim == 0:
        raise ValueError(
            f"tokens {list(tokens.shape)} and starts {list(starts.shape)} must have one shape [..., T]"
        )
    compression, multipliers_LJ, primes_LOK, offsets_LOK = _tables(addressing, tokens.device)
    T = tokens.shape[-1]
    # refuses negative ids, as [] would not
    compressed = compression.index_select(0, tokens.reshape(-1)).view(tokens.shape)
    grams = _grams(addressing, compressed, starts)
    mixes = []
    mix = torch.zeros((), dtype=torch.int64, device=tokens.device)
    for j in range(addressing.max_order):
        mix = mix ^ (grams[j].unsqueeze(-1) * multipliers_LJ[:, j])
        if j + 1 in addressing.orders:
            mixes.append(mix)
    mix_TLO = torch.stack(mixes, dim=-1)
    ids_TLOK = torch.remainder(mix_TLO.unsqueeze(-1), primes_LOK).add_(offsets_LOK)
    return ids_TLOK.reshape(*tokens.shape[:-1], T, len(addressing.layers), addressing.num_slots)


def _grams(addressing: Addressing, compressed: Tensor, starts: Tensor) -> list[Tensor]:
    """The compressed id j positions back, for j = 0 … max_order - 1, each [..., T]; the pad id where it may
    not be seen.
    """
    T = compressed.shape[-1]
    position_T = torch.arange(T, device=compressed.device)
    reach = position_T.expand(compressed.shape)
    if addressing.boundary == "document":
        reach = position_T - torch.where(starts, position_T, 0).cummax(dim=-1).values
    grams = [compressed]
    for j in range(1, addressing.max_order):
        shifted = torch.nn.functional.pad(compressed, (j, 0), value=addressing.pad_id)[..., :T]
        grams.append(torch.where(reach >= j, shifted, addressing.pad_id))
    return grams


@lru_cache(maxsize=8)
def _tables(addressing: Addressing, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """compression [V], multipliers [L, J], primes and offsets [L, O, K] on the device."""
    arrays = (addressing.compression, addressing.multipliers, addressing.primes, addressing.offsets)
    first, second, third, fourth = (torch.tensor(array, dtype=torch.int64, device=device) for array in arrays)
    return first, second, third, fourth
