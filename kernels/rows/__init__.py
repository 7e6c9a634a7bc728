"""Rows of a table: gathered in any order, summed by segment in one order, packed into 8 bits to travel."""
