"""Training: configuration, optimizers, the update, checkpoints, the loop and what a run leaves behind."""

from ._checkpoint import Checkpoints as Checkpoints, load_params as load_params
from ._loop import (
    NonFiniteError as NonFiniteError,
    Profile as Profile,
    seconds_per_step as seconds_per_step,
    train as train,
)
from ._metrics import RunLog as RunLog, read_metrics as read_metrics
from ._optimizer import (
    OptimizerConfig as OptimizerConfig,
    learning_rate_schedule as learning_rate_schedule,
    make_optimizer as make_optimizer,
    muon_dimension_numbers as muon_dimension_numbers,
    parameter_kinds as parameter_kinds,
    weight_decay_mask as weight_decay_mask,
)
from ._run_directory import RunDirectory as RunDirectory, load_run as load_run, open_run as open_run
from ._step import (
    TrainState as TrainState,
    init_state as init_state,
    make_train_step as make_train_step,
    split_batch as split_batch,
    state_leaf_names as state_leaf_names,
)
