"""hybridtrain: a trainer of hybrid-sparse language models (Mixture-of-Experts and Engram lookup tables)."""

__version__ = "0.1.0"
