"""silu(gate) * up, elementwise."""
