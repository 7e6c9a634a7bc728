"""The experts of each token, their gates, and the statistics of the choice."""
