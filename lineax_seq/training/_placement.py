"""Where a run's arrays lie: on one device, or over a mesh of devices of one or several processes.

Without a mesh nothing is moved and nothing is wrapped. Over one, every process reads its own part of each batch, the
state is split as `parallel.state_shardings` says, and the loss runs shard by shard.
"""

from typing import Any

import jax
import optax

from .. import parallel
from ._step import Batch, LossFunction, TrainState, init_state

PyTree = Any


class Placement:
    """The mesh of a run, or None, and what follows from it.

    `params` are the parameters or their shapes, `batches` the numbers of rows that batches have, `length` their tokens.

    Attributes:
      mesh: of `parallel.make_mesh`, or None.
      part: which rows and columns of every batch this process reads.
      shardings: of the training state; None without a mesh.

    Raises:
      ValueError: several processes without a mesh; batches or rows that the mesh does not divide.
    """

    def __init__(
        self,
        mesh: Any,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        *,
        batches: tuple[int, ...],
        length: int,
    ):
        if mesh is None and jax.process_count() > 1:
            raise ValueError(
                f"mesh: {jax.process_count()} processes with {jax.device_count()} devices form this job; say how they "
                f"share the work, such as mesh data={jax.device_count()}"
            )
        self.mesh, self.length = mesh, length
        self.part = parallel.Part(0, 1, None)
        self.shardings = None
        if mesh is not None:
            self.part = [parallel.local_part(mesh, size, length) for size in batches][0]
            like = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
            self.shardings = parallel.state_shardings(mesh, like)

    @property
    def time_axis(self) -> str | None:
        """The mesh axis that time is split over, or None."""
        return parallel.time_axis(self.mesh)

    def loss(self, loss_function: LossFunction) -> LossFunction:
        return loss_function if self.mesh is None else parallel.sharded_loss(loss_function, self.mesh)

    def new_state(self, params: PyTree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
        """`init_state` of parameters that every process has."""
        if self.shardings is None:
            return init_state(params, optimizer, seed)
        params = parallel.distribute(params, self.shardings.params)
        return jax.jit(lambda params: init_state(params, optimizer, seed), out_shardings=self.shardings)(params)

    def batch(self, batch: Batch) -> Batch:
        """The global batch of which `batch` is this process's part."""
        if self.mesh is None:
            return batch
        return parallel.place_batch(self.mesh, self.part, self.length, batch)

    def reading(self, batch_size: int) -> dict[str, Any]:
        """Arguments of `train_iterator` and `eval_batches` for this process's part of batches of `batch_size` rows."""
        block, blocks, columns = self.part
        return dict(batch_size=batch_size // blocks, process_index=block, process_count=blocks, columns=columns)
