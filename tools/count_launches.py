"""What would a GPU be asked to do for one layer? `python -m tools.count_launches [--names]`

Counts a forward and a backward pass of a layer of attention and experts on meta tensors (launches.py), for
this project and its peers (layer_subjects.py), in a table: kernels, host waits, bytes of new tensors, bytes
kept for the backward pass, and the time of Python, in turns. A subject whose package is not installed is
named in a line and left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

from tools.launches import Counted, TorchTime, as_on_a_gpu, count
from tools.layer_subjects import SUBJECTS, Made, Shape


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for size in fields(Shape):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    parser.add_argument("--passes", type=int, default=30, help="timed passes of each subject")
    parser.add_argument("--names", action="store_true", help="list the kernels by name as well")
    options = vars(parser.parse_args(argv))
    passes, names = options.pop("passes"), options.pop("names")
    shape = Shape(**options)
    torch.set_num_threads(1)
    made: dict[str, Made] = {}
    for name, (package, make) in SUBJECTS.items():
        if find_spec(package) is None:
            print(f"{name}: left out, the package {package} is not installed", file=sys.stderr)
        else:
            made[name] = make(shape)
    counted = {name: count(*subject, shape.input()) for name, subject in made.items()}
    packages = [p for p in ("torch", "triton", "transformers", "torchtitan") if find_spec(p)]
    print(", ".join(f"{package} {version(package)}" for package in packages), end="\n\n")
    print(render(counted, seconds(made, shape.input(), passes)))
    if names:
        for name, result in counted.items():
            print(f"\n{name}\n  forward: {_listed(result.forward)}\n  backward: {_listed(result.backward)}")


def seconds(made: dict[str, Made], x: Tensor, passes: int) -> dict[str, float]:
    """Each subject's median CPU time of a forward and backward pass outside of torch's operations, in turns,
    after one pass more."""
    taken: dict[str, list[float]] = {name: [] for name in made}
    with as_on_a_gpu():
        for _ in range(passes + 1):
            for name, (module, forward) in made.items():
                module.zero_grad()
                x.grad = None
                begin = time.thread_time()
                with TorchTime() as in_torch:
                    out = forward(x)
                    out.backward(torch.empty_like(out))
                taken[name].append(time.thread_time() - begin - in_torch.seconds)
    return {name: median(times[1:]) for name, times in taken.items()}


def render(counted: dict[str, Counted], times: dict[str, float]) -> str:
    lines = [
        "| layer | kernels forward | backward | host waits | MB made | MB kept for backward | ms of Python |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in counted.items():
        kernels = f"{result.forward.total()} | {result.backward.total()} | {result.waits.total()}"
        megabytes = f"{result.made_bytes / 1e6:.1f} | {result.saved_bytes / 1e6:.1f}"
        lines.append(f"| {name} | {kernels} | {megabytes} | {times[name] * 1e3:.1f} |")
    return "\n".join(lines)


def _listed(kernels: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(kernels.items()))


if __name__ == "__main__":
    main()
