"""Training: configuration, optimizers, the update, checkpoints, the loop, and what a run leaves behind, for any task.

`Run` is the whole job over a `Task`; `lineax_seq.tasks` has tasks, and `Task` says how to write one. The parts of a run
train anything that has a loss function and an iterator of batches:

    optimizer = make_optimizer(OptimizerConfig(), kinds)
    step = make_train_step(loss_function, optimizer, microbatches=4)
    with Checkpoints(folder) as checkpoints, RunLog(folder, steps=100) as log:
        state = init_state(params, optimizer, seed=0)
        train(state, step, batches, learning_rates=..., log=log, checkpoints=checkpoints)
"""

from ._checkpoint import Checkpoints as Checkpoints, load_params as load_params
from ._command import plain_output as plain_output, run_command as run_command, sentence as sentence
from ._config import (
    DistributedConfig as DistributedConfig,
    RunConfig as RunConfig,
    TrainingConfig as TrainingConfig,
)
from ._evaluate import Evaluator as Evaluator, spread as spread
from ._flags import parse_flags as parse_flags
from ._loop import (
    NonFiniteError as NonFiniteError,
    Profile as Profile,
    seconds_per_step as seconds_per_step,
    train as train,
)
from ._metrics import RunLog as RunLog, clock as clock, read_metrics as read_metrics
from ._optimizer import (
    KINDS as KINDS,
    OptimizerConfig as OptimizerConfig,
    learning_rate_schedule as learning_rate_schedule,
    make_optimizer as make_optimizer,
)
from ._placement import Placement as Placement
from ._report import draw as draw, series as series, training_loss as training_loss
from ._run import Result as Result, Run as Run, traced as traced
from ._run_directory import (
    RunDirectory as RunDirectory,
    check_place as check_place,
    load_run as load_run,
    open_run as open_run,
    write_atomically as write_atomically,
)
from ._step import (
    LossFunction as LossFunction,
    TrainState as TrainState,
    init_state as init_state,
    make_train_step as make_train_step,
    state_leaf_names as state_leaf_names,
)
from ._task import (
    Batch as Batch,
    BatchIterator as BatchIterator,
    Measure as Measure,
    Metrics as Metrics,
    Reading as Reading,
    Sums as Sums,
    Task as Task,
)
