"""The experts of a MoE layer from tokens to tokens: gather, gated SwiGLU of every expert, sum."""
