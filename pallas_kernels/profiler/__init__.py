"""The profiler's parts; `pallas_kernels.profile` is its command line and its public names."""
