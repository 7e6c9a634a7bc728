"""What an Engram layer makes of its rows: the gated value, and the short causal convolution behind it."""
