"""Where a run's arrays lie: on one device, or over a mesh of devices of one or several processes.

Without a mesh nothing is moved and nothing is wrapped. Over one, every process reads its own part of each batch, the
state is split as `parallel.state_shardings` says, and the loss runs shard by shard.
"""

import functools
from typing import Any

import jax
import optax

from .. import parallel
from ._step import LossFunction, TrainState, init_state
from ._task import Batch, Reading, Task

PyTree = Any


class Placement:
    """The mesh of a run, or None, and what follows from it.

    `params` are shapes of the parameters, `length` the tokens of a row (None: rows are not of tokens).

    Attributes:
      mesh: of `parallel.make_mesh`, or None.
      shapes: of the parameters.
      shardings: of the training state; None without a mesh.

    Raises:
      ValueError: several processes without a mesh; a mesh for rows without a length.
    """

    def __init__(
        self,
        mesh: Any,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        *,
        trainable: PyTree | None = None,
        length: int | None,
    ):
        if mesh is None and jax.process_count() > 1:
            raise ValueError(
                f"mesh: {jax.process_count()} processes with {jax.device_count()} devices form this job; say how they "
                f"share the work, such as mesh data={jax.device_count()}"
            )
        if mesh is not None and length is None:
            raise ValueError("mesh: only rows of tokens, [B, T], are split, and this task has others; leave mesh None")
        self.mesh, self._length = mesh, length or 0
        self._optimizer, self._trainable, self.shapes = optimizer, trainable, params
        self.shardings = None
        if mesh is not None:
            self.shardings = parallel.state_shardings(mesh, jax.eval_shape(self._init_state, params))

    def _init_state(self, params: PyTree, seed: int = 0) -> TrainState:
        return init_state(params, self._optimizer, seed, self._trainable)

    @property
    def row_shards(self) -> int:
        """What the rows of a batch must be a multiple of."""
        return parallel.row_shards(self.mesh)

    def loss(self, task: Task) -> LossFunction:
        """The task's loss over global arrays."""
        if self.mesh is None:
            return task.loss
        axis = parallel.time_axis(self.mesh)
        return parallel.sharded_loss(functools.partial(task.loss, axis_name=axis), self.mesh)

    def new_state(self, params: PyTree, seed: int) -> TrainState:
        """`init_state` of parameters that every process has."""
        if self.shardings is None:
            return self._init_state(params, seed)
        params = parallel.distribute(params, self.shardings.params)
        return jax.jit(functools.partial(self._init_state, seed=seed), out_shardings=self.shardings)(params)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of what `new_state` gives."""
        state = jax.eval_shape(self._init_state, self.shapes)
        if self.shardings is None:
            return state
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, state, self.shardings)

    def batch(self, batch: Batch, reading: Reading) -> Batch:
        """On the devices, the global batch of which `batch` is the part that `reading` describes."""
        if self.mesh is None:
            return jax.device_put(dict(batch))
        part = parallel.Part(reading.process_index, reading.process_count, reading.columns)
        return parallel.place_batch(self.mesh, part, self._length, batch)

    def reading(self, batch_size: int) -> Reading:
        """This process's part of batches of `batch_size` rows.

        Raises:
          ValueError: the mesh does not divide them.
        """
        if self.mesh is None:
            return Reading(batch_size)
        block, blocks, columns = parallel.local_part(self.mesh, batch_size, self._length)
        return Reading(batch_size // blocks, block, blocks, columns)
