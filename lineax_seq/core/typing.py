"""The dimension legend and array aliases: the only place where letters are defined.

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
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B T H K"]
Values = Float[Array, "B T HV V"]
HeadGates = Float[Array, "B T HV"]
ChannelGates = Float[Array, "B T HV K"]
SegmentIds = Int[Array, "B T"]
Resets = Bool[Array, "B T"]
MatrixState = Float[Array, "B HV K V"]

# One head's token (or chunk) of inputs by name, its summary, its state: pytrees of arrays.
Inputs = dict[str, Array]
Summary = Any
State = Any
