"""The GPUs that kernels are compiled for: what one multiprocessor holds and what the whole device can do.

Peaks are the vendors' data sheets': dense products and memory bandwidth of A100 SXM 80 GB, H100 SXM, B200 and
MI300X. float32 is multiplied as three tf32 products on NVIDIA's, as it is on AMD's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A compilation target and the device that stands for it in the roofline."""

    name: str
    backend: str
    arch: int | str
    warp: int  # threads
    device: str
    bytes_per_second: float
    flops: dict[int, float]  # of products, by the operands' bits
    registers: int  # 32-bit, of one multiprocessor
    shared: int  # bytes of one multiprocessor
    max_warps: int
    max_blocks: int
    reserved: int  # bytes of shared memory that every block costs besides its own

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """PartialExchange of a multiprocessor's warps that can be resident: registers go out in blocks of 256
        a warp, shared memory with `reserved` more a block."""
        per_warp = -(-max(registers, 1) * self.warp // 256) * 256
        blocks = min(
            self.max_blocks,
            self.max_warps // warps,
            self.registers // (per_warp * warps),
            self.shared // max(1, shared + self.reserved),
        )
        return blocks * warps / self.max_warps

    def seconds(self, moved: int, flops: int, bits: int = 16) -> float:
        """The roofline: the longer of moving the bytes and doing the products of operands of so many bits."""
        return max(moved / self.bytes_per_second, flops / self.flops[bits] if flops else 0.0)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "sm_80", "cuda", 80, 32, "A100", 2.039e12, {16: 312e12, 32: 52e12}, 65536, 164 << 10, 64, 32, 1024
        ),
        Target(
            "sm_90",
            "cuda",
            90,
            32,
            "H100",
            3.35e12,
            {8: 1979e12, 16: 989e12, 32: 165e12},
            65536,
            228 << 10,
            64,
            32,
            1024,
        ),
        Target(
            "sm_100",
            "cuda",
            100,
            32,
            "B200",
            8.0e12,
            {8: 4500e12, 16: 2250e12, 32: 375e12},
            65536,
            228 << 10,
            64,
            32,
            1024,
        ),
        Target(
            "gfx942",
            "hip",
            "gfx942",
            64,
            "MI300X",
            5.3e12,
            {16: 1307e12, 32: 163e12},
            131072,
            64 << 10,
            32,
            32,
            0,
        ),
    )
}
