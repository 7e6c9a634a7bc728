"""Root-mean-square normalisation, and rotary positions with the norm of queries and keys before them."""
