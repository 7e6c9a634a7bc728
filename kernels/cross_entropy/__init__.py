"""Summed cross-entropy of logits."""
