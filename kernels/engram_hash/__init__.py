"""Which rows of the lookup tables a token reads: the addressing, its definition and the fast op."""
