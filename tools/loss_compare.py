"""Compare the loss curves of two runs, step by step: `python tools/loss_compare.py RUN_A RUN_B
[--assert-equal | --rtol 1e-5]`.

Prints the largest relative difference and its step; with a bound, exits 1 where it is exceeded. A step that
only one run logged is a difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybridtrain.monitor.metrics import read_metrics


def losses(run: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(run) if key in line}


def compare(a: dict[int, float], b: dict[int, float]) -> tuple[float, int]:
    """(largest relative difference, its step); raises ValueError where the steps differ."""
    if not a or a.keys() != b.keys():
        raise ValueError(
            f"the runs logged different steps: {len(a)} and {len(b)}, {len(a.keys() & b.keys())} in common"
        )
    return max((abs(a[step] - b[step]) / max(abs(a[step]), 1e-30), step) for step in a)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="run folder")
    parser.add_argument("b", type=Path, help="run folder")
    parser.add_argument("--key", default="loss", help="the metric to compare")
    parser.add_argument("--rtol", type=float, help="largest relative difference allowed")
    parser.add_argument("--assert-equal", action="store_true", help="allow no difference at all, not one bit")
    args = parser.parse_args()
    try:
        worst, step = compare(losses(args.a, args.key), losses(args.b, args.key))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.key}: largest relative difference {worst:.3e} at step {step}")
    bound = 0.0 if args.assert_equal else args.rtol
    if bound is not None and worst > bound:
        print(f"that exceeds {bound:g}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
