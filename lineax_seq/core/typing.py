"""The dimension legend: the only place where letters are defined; and what the mathematics of one head is made of.

======  ==========================================================================
letter  meaning
======  ==========================================================================
B       batch: independent sequences
T       tokens of a sequence
H       heads of queries and keys
HV      heads of values, gates and states; HV = n·H, value head j reads key head j // n
NH      micro-steps of a token (Householder factors of its transition)
K       channels of a query or key head
V       channels of a value head
C       tokens of a chunk
N       chunks of a sequence; of mamba, the states of a channel
D       channels of a vector recurrence, or the width of a model
L       levels of log-linear attention
P       devices on the sequence axis
======  ==========================================================================

Shapes are written in these letters: `"B T H K"` in a recurrence's arguments, in the signatures that
`recurrences/__init__.pyi` shows, and in docstrings.
"""

from typing import Any

from jax import Array

# One head's token (or chunk) of inputs by name, its summary, its state: pytrees of arrays.
Inputs = dict[str, Array]
Summary = Any
State = Any
