"""Sums of rows by segment in a fixed order: the same bits at every run and thread count."""

from hybridtrain.kernels.segment_sum.op import segment_sum

__all__ = ["segment_sum"]
