"""Rows of a table in any order, table sizes beyond 2^31 elements included."""
