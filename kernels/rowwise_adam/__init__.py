"""The update of touched table rows in one pass."""
