"""Pallas kernels for the recurrences' chunk forms; imports only jax. There are none yet: XLA runs every form."""
