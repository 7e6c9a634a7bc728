"""The output head and the loss as one op that never holds all logits."""
