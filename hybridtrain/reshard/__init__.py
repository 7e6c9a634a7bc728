"""Lays a checkpoint's files out for the ranks of another layout, without those ranks, in bounded memory.

tool.py       the whole of it            source.py    the tensors as the target has them
target.py     settings and layout        copy.py      writes them and reads them back
placement.py  which rank has what        journal.py   how far it has come
digest.py     of logical tensors     tokens.py    a larger tokenizer
"""

from hybridtrain.reshard.copy import CopyOptions
from hybridtrain.reshard.digest import digest_stored
from hybridtrain.reshard.target import Growth
from hybridtrain.reshard.tool import Outcome, reshard

__all__ = ["CopyOptions", "Growth", "Outcome", "digest_stored", "reshard"]
