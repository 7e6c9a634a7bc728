"""How far a looked-up memory agrees with the hidden state, and the value gated by it."""
