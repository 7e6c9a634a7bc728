from __future__ import annotations

import json
import time

import numpy as np
import pytest

from hybridtrain.kernels.engram_hash.addressing import (
    Addressing,
    AddressingError,
    TableShape,
    draw_multipliers,
    draw_primes,
)
from hybridtrain.kernels.engram_hash.primes import is_prime, next_prime

COMPRESSION = np.arange(50) % 40


def small() -> Addressing:
    return Addressing.draw(TableShape([1, 3], [2, 3], 2, 100), COMPRESSION, pad_id=7, seed=5)


def test_is_prime_agrees_with_trial_division():
    by_division = [n for n in range(5000) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(5000) if is_prime(n)] == by_division


@pytest.mark.parametrize(
    "composite",
    [561, 3215031751, 3474749660383, 341550071728321, 3825123056546413051, (2**31 - 1) ** 2, 2**63 - 1],
)
def test_pseudoprimes_are_composite(composite):
    assert not is_prime(composite)


@pytest.mark.parametrize("prime", [2, 37, 41, 2**31 - 1, 2**61 - 1, 2**63 - 25])
def test_large_primes(prime):
    assert is_prime(prime)


def test_next_prime():
    assert [next_prime(n) for n in (-3, 2, 3, 4, 90, 97)] == [2, 2, 3, 5, 97, 97]


def test_published_row_counts():
    start = time.perf_counter()
    flash = Addressing.draw(TableShape([1, 14], [2, 3, 4], 8, 16_000_000), np.arange(99_092), 0)
    assert time.perf_counter() - start < 1.0
    assert flash.rows_per_layer == (384_006_168, 384_016_682)
    paper = Addressing.draw(TableShape([1, 14], [2, 3], 8, 2_262_400), np.arange(99_092), 0)
    assert round(paper.num_rows * 80 / 1e9, 2) == 5.79


def test_published_multipliers():
    assert draw_multipliers([1, 14], 4, 99_092, seed=0).tolist() == [
        [76632096046245, 4839876093313, 35959672319349, 73987337458391],
        [67716810739261, 51510806800915, 30921347202721, 82619226485591],
    ]


def test_multipliers_never_overflow_and_belong_to_their_layer():
    for vocab in (1, 2, 99_092, 2**31):
        multipliers = draw_multipliers(range(20), 4, vocab, seed=3)
        assert (multipliers > 0).all()
        assert (multipliers % 2 == 1).all()
        assert int(multipliers.max()) * (vocab - 1) < 2**63
    np.testing.assert_array_equal(draw_multipliers([4, 9], 3, 100, 1)[1], draw_multipliers([9], 3, 100, 1)[0])


def test_primes_are_the_first_ones_from_the_row_count():
    assert draw_primes(2, 2, 2, rows_per_head=11).reshape(-1).tolist() == [11, 13, 17, 19, 23, 29, 31, 37]


def test_offsets_pack_every_head_behind_the_one_before():
    a = small()
    assert a.offsets.shape == (2, 2, 2)
    assert a.offsets.reshape(-1)[0] == 0
    np.testing.assert_array_equal((a.offsets + a.primes).reshape(-1)[:-1], a.offsets.reshape(-1)[1:])
    assert a.num_rows == a.offsets.reshape(-1)[-1] + a.primes.reshape(-1)[-1] == sum(a.rows_per_layer)
    assert (a.num_slots, a.max_order) == (4, 3)


def test_arrays_are_frozen():
    with pytest.raises(ValueError, match="read-only"):
        small().primes[0, 0, 0] = 3


def test_json_round_trip():
    a = small()
    b = Addressing.from_json(a.to_json(), COMPRESSION)
    assert b.to_json() == a.to_json()
    np.testing.assert_array_equal(b.multipliers, a.multipliers)
    np.testing.assert_array_equal(b.primes, a.primes)


def test_json_written_by_hand_needs_no_digest():
    tree = json.loads(small().to_json())
    del tree["compression_sha256"], tree["format"]
    assert Addressing.from_json(json.dumps(tree), COMPRESSION).to_json() == small().to_json()


def test_json_refuses_another_compression():
    other = COMPRESSION.copy()
    other[3] = 4
    with pytest.raises(AddressingError, match="made for another token compression"):
        Addressing.from_json(small().to_json(), other)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"multipliers": [[1, 3, 5]]},
            [r"multipliers have shape \[1, 3\], must be \[layers, max order\] = \[2, 3\]"],
        ),
        (
            {"multipliers": [[1, 3, 4], [1, -3, 0]]},
            ["multiplier 4 must be odd", "multiplier -3 must be odd", "multiplier 0 must be odd"],
        ),
        ({"multipliers": [[1, 3], [1]]}, ["multipliers is not a regular array"]),
        (
            {"multipliers": [[1, 3, 2**63 + 1], [1, 3, 5]]},
            ["multipliers is not a regular array of 64-bit integers"],
        ),
        (
            {"multipliers": [[1, 3, 5.5], [1, 3, 5]]},
            ["multipliers is not a regular array of 64-bit integers"],
        ),
        (
            {"primes": [[[2, 3], [5, 9]], [[11, 13], [17, 21]]]},
            ["modulus 9 is not prime", "modulus 21 is not prime"],
        ),
        ({"primes": [[[2, 3], [5, 7]], [[11, 13], [17, 2]]]}, ["modulus 2 is used 2 times"]),
        (
            {"primes": [[[2, 3, 5]]]},
            [r"primes have shape \[1, 1, 3\], must be \[layers, orders, heads\] = \[2, 2, 2\]"],
        ),
        ({"layers": [3, 1]}, [r"layers=\[3, 1\] must be rising layer ids"]),
        ({"layers": "1"}, ['layers="1" is not a list of integers']),
        (
            {"orders": [3, 2], "heads": 0, "pad_id": 40},
            ["orders=", "heads=0 must be at least 1", "pad_id=40 is not a compressed id; it may be 0 to 39"],
        ),
        ({"orders": []}, [r"orders=\[\] must be"]),
        ({"heads": 2.0}, ["heads=2.0 is not an integer"]),
        ({"boundary": "page"}, ["boundary='page' must be"]),
        ({"format": 2}, ["format 2 is not known here"]),
        ({"prime": 1}, ['key "prime" is unknown']),
    ],
)
def test_json_refuses_what_is_wrong_and_lists_all_of_it(change, messages):
    tree = {**json.loads(small().to_json()), **change}
    with pytest.raises(ValueError, match=r"^addressing: \d+ problem") as caught:
        Addressing.from_json(json.dumps(tree), COMPRESSION)
    for message in messages:
        assert caught.match(message)


def test_json_names_missing_keys_and_broken_text():
    with pytest.raises(AddressingError, match='key "primes" is missing'):
        Addressing.from_json("{}", COMPRESSION)
    with pytest.raises(AddressingError, match="is not JSON"):
        Addressing.from_json("{", COMPRESSION)
    for text in ("[" * 100_000, '{"layers": ' + "9" * 5000 + "}"):
        with pytest.raises(AddressingError, match="is not JSON"):
            Addressing.from_json(text, COMPRESSION)
    with pytest.raises(AddressingError, match="is longer than 1,048,576 characters"):
        Addressing.from_json(" " * 2**21, COMPRESSION)
    with pytest.raises(AddressingError, match="is not JSON object"):
        Addressing.from_json("[]", COMPRESSION)


def test_draw_lists_all_that_is_wrong():
    with pytest.raises(AddressingError, match="4 problem") as caught:
        Addressing.draw(TableShape([], [3, 2], 2, 0), COMPRESSION, pad_id=99)
    for message in ("rows_per_head=0", "layers=", "orders=", "pad_id=99"):
        assert caught.match(message)
    with pytest.raises(AddressingError, match="negative id -1"):
        Addressing.draw(TableShape([0], [2], 1, 10), [0, -1, 2], pad_id=0)
    with pytest.raises(AddressingError, match="compression must be a list of integers"):
        Addressing.draw(TableShape([0], [2], 1, 10), [0.5], pad_id=0)
