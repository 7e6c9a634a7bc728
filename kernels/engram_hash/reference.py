"""The definition of the row ids, one n-gram at a time: slow and plain, what op.py must equal bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridtrain.kernels.engram_hash.addressing import Addressing, Int64s


def row_ids(
    addressing: Addressing, tokens_BT: npt.NDArray[np.integer], starts_BT: npt.NDArray[np.bool_]
) -> Int64s:
    """Row ids int64 [B, T, L, S] in the packed table of all Engram layers, for tokens int [B, T].

    starts_BT is True where a document starts. S walks orders, then heads.
    """
    a = addressing
    B, T = tokens_BT.shape
    out_BTLS = np.empty((B, T, len(a.layers), a.num_slots), dtype=np.int64)
    for b in range(B):
        for t in range(T):
            gram = _gram(a, tokens_BT[b], starts_BT[b], t)
            for layer in range(len(a.layers)):
                out_BTLS[b, t, layer] = _slots(a, gram, layer)
    return out_BTLS


def _gram(
    a: Addressing, tokens_T: npt.NDArray[np.integer], starts_T: npt.NDArray[np.bool_], t: int
) -> list[np.int64]:
    """Compressed ids at t, t-1, … t-max_order+1; the pad id from the first position that t may not see."""
    gram: list[np.int64] = []
    visible = True
    for j in range(a.max_order):
        visible = visible and t - j >= 0
        gram.append(a.compression[tokens_T[t - j]] if visible else np.int64(a.pad_id))
        if visible and starts_T[t - j] and a.boundary == "document":
            visible = False
    return gram


def _slots(a: Addressing, gram: list[np.int64], layer: int) -> list[int]:
    """The S row ids of one token in Engram layer number `layer`."""
    ids = []
    for o, order in enumerate(a.orders):
        mix = np.int64(0)
        with np.errstate(
            over="ignore"
        ):  # loaded multipliers may be so large that products wrap, as int64 does everywhere
            for j in range(order):
                mix = mix ^ (gram[j] * a.multipliers[layer, j])
        for k in range(a.heads):
            ids.append(int(a.offsets[layer, o, k] + mix % a.primes[layer, o, k]))
    return ids
