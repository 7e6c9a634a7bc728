"""Attention over what earlier layers wrote at the same token."""
