"""The settings of Engram layers and of their table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridtrain.kernels.engram_hash.addressing import Boundary
from hybridtrain.kernels.rows.op import Wire
from hybridtrain.section import Fraction, Natural, NonNegative, Positive, Section

FetchAheadMode = Literal["overlap", "stale"]
FetchMode = Literal["step", FetchAheadMode]


class EngramSettings(Section):
    enabled: bool = Field(True, description="false removes the Engram layer from every layer of the pattern")
    orders: tuple[Positive, ...] = Field((2, 3), description="n-gram lengths")
    heads: Positive = Field(4, description="hash heads per order")
    head_dim: Positive = Field(32, description="width of one row")
    rows_per_head: Positive = Field(16384, description="a head has the first unused prime >= this many rows")
    hash_seed: Natural = Field(0, description="seed of the multipliers")
    addressing: str = Field(
        "", description="JSON file with stored multipliers and primes to use instead of drawing them"
    )
    boundary: Boundary = Field("document", description="n-grams stop at document starts, or run across")
    gate_floor: float = Field(
        1e-6,
        gt=0,
        le=1e6,
        description="least |s| under the gate's root; bounds its slope to 1/(2*sqrt(gate_floor))",
    )
    conv: bool = Field(True, description="short convolution after the gate")
    conv_kernel: Positive = Field(
        4, description="taps of the short convolution; its dilation is the longest order"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of rows at initialisation")
    checksum: bool = Field(False, description="verify every exchanged payload with a checksum")
    exchange_groups: Positive = Field(1, description="exchanges per step; divides train.micro_batches")
    fetch: FetchMode = Field(
        "step",
        description="when rows are read: before their step; those that the step before leaves alone already "
        "during it (the same numbers); or all of them during it, one update old",
    )
    device: Literal["device", "host"] = Field(
        "device", description="table, row state and row update: with the model, or on the CPU"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the table; bfloat16 rows are rounded stochastically, by run.seed, step and row",
    )
    wire: Wire = Field(
        "exact",
        description="what rows travel as: as they are, or rounded; float8 is e4m3 with a scale for each row",
    )
    wire_gradients: Wire = Field(
        "exact", description="what the rows' gradients travel as: float32 as they are, or rounded like `wire`"
    )
    optimizer: Literal["rowwise_adam", "rowwise_adagrad", "adam"] = Field(
        "rowwise_adam",
        description="of the table; adam is the dense reference, with two moments per element and a dense "
        "update",
    )
    lr_multiplier: float = Field(
        5.0, gt=0, description="learning rate of the table as a multiple of optim.lr"
    )
    beta2: Fraction = Field(0.95, description="decay of the table's second moment per step")
    eps: float = Field(1e-8, gt=0, description="added to the root of the table's second moment")
    weight_decay: NonNegative = Field(
        0.0, description="of the table; decoupled, replayed when a row is next read"
    )

    @property
    def slots(self) -> int:
        """Rows that a token reads in one layer."""
        return len(self.orders) * self.heads

    def problems(self) -> list[str]:
        out: list[str] = []
        if not self.orders or list(self.orders) != sorted(set(self.orders)) or self.orders[0] < 2:
            out.append(f"orders={list(self.orders)} must be rising n-gram lengths from 2 on, e.g. [2, 3]")
        return out
