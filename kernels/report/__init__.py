"""What the compiler makes of the kernels for real GPUs, found out without one."""
