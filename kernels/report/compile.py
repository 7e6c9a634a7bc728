"""Compiles a recorded launch ahead of time, with no GPU, and reads registers, spills and accesses out of the
machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybridtrain.kernels.launch import Launch
from hybridtrain.kernels.report.hardware import Target

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_ALIGNED = [["tt.divisibility", 16]]
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_SASS_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E(?:\.[A-Z0-9_]+)*")
_SASS_SPILL = re.compile(r"\bSTL(?:\.[A-Z0-9_]+)*")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_(dwordx?\d*|[us]?byte|[us]?short)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


@dataclass(frozen=True)
class Machine:
    """What a kernel came to on a target."""

    registers: int
    spill_bytes: int  # of one thread
    shared_bytes: int  # of one block
    load_bits: int  # of the widest global load; 0 where there is none
    store_bits: int
    wide_share: float  # of the bytes of all global access instructions, those in accesses of 128 bits
    tensor_core: int  # matrix instructions in the code


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments by argument, as Triton itself specialises such a call."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        if place >= len(launch.arguments):
            types[name] = "constexpr"
            continue
        value = launch.arguments[place]
        if value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], attributes[(place,)] = "*" + _TYPES[value.dtype], _ALIGNED
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = _ALIGNED
    return types, constants, attributes


def compile_launch(launch: Launch, target: Target) -> Machine:
    """The kernel of the launch for the target."""
    if target.backend == "hip" and launch.constants.get("PRECISION") == "tf32x3":
        launch = replace(
            launch, constants=launch.constants | {"PRECISION": "ieee"}
        )  # as grouped_mlp chooses there
    compiled = triton.compile(
        ASTSource(launch.kernel, *signature(launch)),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    shared = compiled.metadata.shared
    return (
        _read_amd(compiled.asm["amdgcn"], shared)
        if target.backend == "hip"
        else _read_nvidia(compiled.asm["cubin"], shared)
    )


def _read_nvidia(cubin: bytes, shared: int) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers = int(re.search(r"\bREG:(\d+)", usage)[1])  # type: ignore[index]
    spilled = sum(_sass_bits(instruction) for instruction in _SASS_SPILL.findall(sass)) // 8
    accesses = [(m[1] != "STG", _sass_bits(m[0])) for m in _SASS_ACCESS.finditer(sass)]
    matrix = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA|QGMMA)\b", sass))
    return Machine(registers, spilled, shared, *_widths(accesses), matrix)


def _sass_bits(instruction: str) -> int:
    """Width of an access: its suffix, or 32 where it has none."""
    for part in instruction.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if re.fullmatch("[US](8|16)", part):
            return int(part[1:])
    return 32


def _read_amd(assembly: str, shared: int) -> Machine:
    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])  # type: ignore[index]

    accesses = [
        (m[1] == "load", _AMD_BITS.get(m[2], 8 if "byte" in m[2] else 16))
        for m in _AMD_ACCESS.finditer(assembly)
    ]
    spills = 4 * count(
        "vgpr_spill_count"
    )  # scalar registers spill into lanes of vector registers, not into memory
    return Machine(count("vgpr_count"), spills, shared, *_widths(accesses), assembly.count("v_mfma"))


def _widths(accesses: list[tuple[bool, int]]) -> tuple[int, int, float]:
    """(widest load, widest store, share of bits in accesses of at least 128) of (is load, bits) pairs."""
    loads, stores = ([bits for is_load, bits in accesses if is_load is kind] for kind in (True, False))
    total = sum(loads) + sum(stores)
    wide = sum(bits for bits in loads + stores if bits >= 128)
    return max(loads, default=0), max(stores, default=0), round(wide / max(total, 1), 3)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout
