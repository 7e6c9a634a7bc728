"""`python -m hybridtrain`, for launchers that start modules: torchrun -m hybridtrain train CONFIG."""

from hybridtrain.cli import main

if __name__ == "__main__":
    main()
