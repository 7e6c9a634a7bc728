"""Pickles are read as data: whatever they name is not imported, not called, and costs no more memory than the
file is long.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from hybridtrain.checkpoint.index import read_index
from hybridtrain.files.pickles import Made, Named, unpickle
from hybridtrain.files.untrusted import UntrustedFileError
from tests.fuzz.harness import Trap

PLAIN = [
    None,
    True,
    -1,
    2**31,
    -(2**70),
    0.5,
    "text",
    "\ud800",
    b"bytes",
    [1, [2]],
    (1, (2, 3), 4, 5),
    {"a": {"b": (1,)}, 2: None, (1, "x"): 3},
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_are_what_they_were(protocol: int) -> None:
    value = [item for item in PLAIN if protocol > 2 or not isinstance(item, bytes)]
    assert unpickle(pickle.dumps([value, value], protocol), "it", ()) == [value, value]
    assert unpickle(pickle.dumps("x" * 300, protocol), "it", ()) == "x" * 300


def test_objects_are_read_as_what_is_said_of_them() -> None:
    made = unpickle(
        pickle.dumps([argparse.Namespace(a=1), torch.float32, collections.OrderedDict(b=2)]), "it", None
    )
    assert (made[0].name, made[0].state) == ("argparse.Namespace", {"a": 1})
    assert made[1] == Named("torch", "float32")
    assert (made[2].name, made[2].items) == ("collections.OrderedDict", [("b", 2)])


def test_what_is_named_is_not_run_and_unless_known_refused(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    content = pickle.dumps({"a": [trap]})
    with pytest.raises(
        UntrustedFileError, match=r"^it: names posix\.system, which is not part of such a file"
    ):
        unpickle(content, "it", {"torch.Size"})
    made = unpickle(content, "it", None)["a"][0]
    assert isinstance(made, Made)
    assert (made.name, made.args) == ("posix.system", (f"touch {trap.path}",))
    assert not trap.sprang


@pytest.mark.parametrize(
    "name",
    [
        *(
            b"\x8c\x05torch\x8c\x09os.system\x93",
            b"ctorch\nos.system\n",
            b"ctorch.os\nsystem\n",
            b"cos\nsystem\n",
            b"cbuiltins\neval\n",
        ),
        *(
            b"ctorch\nload\n",
            b"ctorch.distributed.checkpoint.metadata\nos.system\n",
            b"ctorch.distributed.checkpoint.metadata\nEnum\n",
        ),
    ],
)
def test_names_are_known_as_a_whole_alone(name: bytes) -> None:
    with pytest.raises(UntrustedFileError, match="which is not part of such a file"):
        read_index(b"\x80\x04" + name + b"\x8c\x01xR.", "it")


BOMBS = {
    "a memo number of billions": b"\x80\x04Nr\xff\xff\xff\xff0N.",
    "bytes of 2^62": b"\x80\x05\x8e" + (2**62).to_bytes(8, "little") + b".",
    "a bytearray of 2^40": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a string of 4 GB": b"\x80\x04X\xff\xff\xff\xff.",
    "a frame of 2^60": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "a long of 2 GB": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "lists in lists": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "tuples in tuples": b"\x80\x04)" + b"\x85" * 50_000 + b".",
    "a tuple of tuples as a key": b"\x80\x04})" + b"\x85" * 50_000 + b"Ns.",
    "calls of calls": b"\x80\x04cos\nsystem\n" + b")R" * 50_000 + b".",
    "marks": b"\x80\x04" + b"(" * 50_000 + b".",
    "an empty memo": b"\x80\x04h\x05.",
    "a mark that is missing": b"\x80\x04t.",
    "a list that is none": b"\x80\x04NNa.",
    "half a pair": b"\x80\x04}(Nu.",
    "two values": b"\x80\x04NN.",
    "no value": b"\x80\x04.",
    "no end": b"\x80\x04N",
    "nothing": b"",
    "an old instruction": b"(S'ls'\nios\nsystem\n.",
    "a state of a string": b"\x80\x04\x8c\x01x}b.",
    "something outside": b"\x80\x04NQ.",
    "a list that has itself": b"\x80\x04]\x94h\x00a.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_end_in_a_message_and_in_little_memory(what: str) -> None:
    tracemalloc.start()
    with pytest.raises(UntrustedFileError, match=r"^it: "):
        read_index(BOMBS[what], "it")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(BOMBS[what]) + 200_000


def named(name: str) -> bytes:
    return f"c{dcp.__name__}\n{name}\n".encode()


def said(tensors: bytes) -> bytes:
    """An index of the tensors in a pickled dict, and of no places."""
    return (
        b"\x80\x04"
        + named("Metadata")
        + b")\x81}(\x8c\x13state_dict_metadata"
        + tensors
        + b"\x8c\x0cstorage_data}ub."
    )


def tensor(chunks: bytes) -> bytes:
    properties = named("TensorProperties") + b")\x81(ctorch\nfloat32\ntb"
    said = b"}(\x8c\x04size)\x8c\x0aproperties" + properties + b"\x8c\x06chunks](" + chunks + b"eu"
    return named("TensorStorageMetadata") + b")\x81" + said + b"bq\x00"


CHUNK = (
    named("ChunkStorageMetadata")
    + b")\x81}(\x8c\x07offsets("
    + b"K\x01" * 100
    + b"t\x8c\x05sizes)ubq\x01"
    + b"h\x01" * 99
)
NUMBERS = [b"\x8c\x04%04d" % number for number in range(1000)]
SHARED = {
    "a name of pairs of pairs": said(
        b"}" + named("MetadataIndex") + b"N" + b"q\x00h\x00\x86" * 18 + b"\x85R" + tensor(b"N") + b"s"
    ),
    "one list of chunks of many tensors": said(
        b"}(" + NUMBERS[0] + tensor(CHUNK) + b"h\x00".join([*NUMBERS[1:], b""]) + b"u"
    ),
    "one module of many names": b"\x80\x04X\x40\x42\x0f\x00"
    + b"m" * 1_000_000
    + b"q\x00"
    + b"\x93h\x00".join(NUMBERS)
    + b"\x93.",
}


@pytest.mark.parametrize("what", SHARED)
def test_what_stands_in_many_places_takes_its_memory_once(what: str) -> None:
    tracemalloc.start()
    with pytest.raises(UntrustedFileError, match=r"^it: ") as caught:
        read_index(SHARED[what], "it")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(SHARED[what]) + 400_000
    assert len(str(caught.value)) < 1000


def index(size: Any = (4, 2), chunks: Any = (((0, 0), (2, 2)), ((2, 0), (2, 2))), **place: Any) -> bytes:
    """An index of one tensor of two chunks, with something else."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensor = dcp.TensorStorageMetadata(
        dcp.TensorProperties(torch.float32), size, [dcp.ChunkStorageMetadata(*c) for c in chunks]
    )
    places = {
        dcp.MetadataIndex("t", c[0]): _StorageInfo(
            **({"relative_path": "f", "offset": 100 * i, "length": 100} | place)
        )
        for i, c in enumerate(chunks)
    }
    return pickle.dumps(dcp.Metadata({"t": tensor}, storage_data=places))


def check(content: bytes) -> None:
    read_index(content, "it").check("it", {"f": 1000})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (index(size=(2**58, 2)), "leave out a part"),
        (index(size=(2**60, 2), chunks=(((0, 0), (2**60, 2)),)), "more than any memory holds"),
        (index(size=(2**40, 2), chunks=(((0, 0), (2**40, 2)),)), r"is said to lie in 100 bytes"),
        (index(size=(5, 2)), r"its chunks leave out a part of \[5, 2\]"),
        (index(chunks=(((0, 0), (2, 2)), ((1, 0), (2, 2)))), "its chunks leave out a part"),
        (index(chunks=(((0, 0), (2, 2)), ((0, 0), (2, 2)))), "its chunks leave out a part"),
        (
            index(chunks=(((0, 0), (2, 2)), ((3, 0), (2, 2)))),
            r"the chunk \[2, 2\] at \[3, 0\] leaves \[4, 2\]",
        ),
        (index(chunks=(((0, 0), (2, 2)), ((2,), (2,)))), "another number of dims"),
        (index(size=(-4, 2)), "a size or offset is not a whole number"),
        (index(size="44"), "sizes or offsets are not numbers by dim"),
        (index(size=(True, 2)), "a size or offset is not a whole number"),
        (index(offset=0), "two chunks lie in the same bytes"),
        (index(offset=950), "a chunk ends at byte 1050 of 1000"),
        (index(relative_path="../f"), r"\.\./f: is not one of the checkpoint's files"),
        (index(relative_path=3), "a int is not a string"),
        (index(transform_descriptors=["zstd"]), "files that were transformed are not read"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(content: bytes, why: str) -> None:
    check(index())
    with pytest.raises(UntrustedFileError, match=why):
        check(content)


def test_chunks_of_any_cut_may_fill_a_tensor() -> None:
    check(
        index(
            size=(3, 3),
            chunks=(((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))),
        )
    )
    check(index(size=(0, 3), chunks=()))
    check(index(size=(), chunks=(((), ()),)))
