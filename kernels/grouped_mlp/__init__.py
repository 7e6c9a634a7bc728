"""A SwiGLU per expert over rows sorted by expert."""
