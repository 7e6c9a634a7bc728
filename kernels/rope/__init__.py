"""Rotary positions, with the norm of queries and keys before them."""
