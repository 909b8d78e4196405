"""Sequence parallelism and meshes: everything that sends data between devices or names a mesh axis."""

from .attention import (
    STRATEGIES as STRATEGIES,
    attention as attention,
    from_zigzag as from_zigzag,
    to_zigzag as to_zigzag,
)
from .halo import (
    borders as borders,
    left_halo as left_halo,
    positions as positions,
    run_ids as run_ids,
    token_shift as token_shift,
)
from .mesh import (
    AXES as AXES,
    Part as Part,
    distribute as distribute,
    local_part as local_part,
    make_mesh as make_mesh,
    parse_mesh as parse_mesh,
    place_batch as place_batch,
    row_shards as row_shards,
    sharded_loss as sharded_loss,
    state_shardings as state_shardings,
    time_axis as time_axis,
)
from .multihost import (
    Agreement as Agreement,
    broadcast as broadcast,
    initialize as initialize,
    is_main as is_main,
    main_first as main_first,
    to_host as to_host,
)
from .placement import placed as placed
from .rows import by_rows as by_rows
from .sharded import (
    over_time as over_time,
    sequence_parallel as sequence_parallel,
)
