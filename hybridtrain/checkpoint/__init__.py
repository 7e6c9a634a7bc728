"""Checkpoints: torch's distributed format under a commit protocol. A folder without `checkpoint.json` was
never finished.

storage.py      a folder or URL as a path
files.py        files with checksums
archive.py      the archives that the chunks lie in
chunk.py        a stored chunk of a tensor
index.py        torch's index of the tensors, checked
info.py         checkpoint.json
saved.py        a folder with its description, read once
damage.py       whether its files have changed
dtypes.py       the dtypes that weights may have
blocks.py       large tensors in blocks of rows
state.py        the parts of a run that are saved
saver.py        saves them, also beside the training
load.py         checks them and fills a run from one
history.py      those of a run: the latest, older ones, those to remove
consumed.py     how much of the data a run has read
stored.py       tensors one by one, without a process group
all_or_none.py  ranks that succeed or fail together
"""

from hybridtrain.checkpoint.consumed import Consumed
from hybridtrain.checkpoint.history import candidates, commit_folder, latest
from hybridtrain.checkpoint.info import (
    FORMAT,
    INFO,
    changed_settings,
    check_fits,
    identity,
    read_info,
    row_scalars,
    write_info,
)
from hybridtrain.checkpoint.load import load, read_into, verify
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.checkpoint.saver import Base, Saver
from hybridtrain.checkpoint.storage import open_storage
from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors, write_tensors

__all__ = [
    "FORMAT",
    "INFO",
    "Base",
    "Consumed",
    "LazyTensor",
    "Saved",
    "Saver",
    "StoredTensors",
    "candidates",
    "changed_settings",
    "check_fits",
    "commit_folder",
    "identity",
    "latest",
    "load",
    "open_storage",
    "read_info",
    "read_into",
    "row_scalars",
    "verify",
    "write_info",
    "write_tensors",
]
