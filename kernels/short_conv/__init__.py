"""The short causal convolution behind the memory's gate, with its norm, SiLU and addition."""
