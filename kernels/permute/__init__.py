"""Sorting token-expert pairs by expert, and the weighted way back."""
