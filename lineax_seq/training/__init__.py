"""Training: configuration, optimizers, the update, checkpoints, the loop, and what a run leaves behind.

`LanguageModelRun` is the whole job; its parts train anything that has a loss function and a Grain iterator:

    step = make_train_step(loss_function, make_optimizer(OptimizerConfig()), microbatches=4)
    with Checkpoints(folder) as checkpoints, RunLog(folder, steps=100) as log:
        train(state, step, batches, learning_rates=..., log=log, checkpoints=checkpoints)
"""

from ._checkpoint import Checkpoints as Checkpoints, load_params as load_params
from ._config import (
    DataConfig as DataConfig,
    DistributedConfig as DistributedConfig,
    LanguageModelConfig as LanguageModelConfig,
    TrainingConfig as TrainingConfig,
)
from ._decoder import decoder_loss as decoder_loss, load_language_model as load_language_model
from ._evaluate import Evaluator as Evaluator, bits_per_byte as bits_per_byte
from ._flags import parse_flags as parse_flags
from ._language_model import LanguageModelRun as LanguageModelRun, Result as Result
from ._loop import (
    NonFiniteError as NonFiniteError,
    Profile as Profile,
    seconds_per_step as seconds_per_step,
    train as train,
)
from ._metrics import RunLog as RunLog, clock as clock, read_metrics as read_metrics
from ._optimizer import (
    OptimizerConfig as OptimizerConfig,
    learning_rate_schedule as learning_rate_schedule,
    make_optimizer as make_optimizer,
    muon_dimension_numbers as muon_dimension_numbers,
    parameter_kinds as parameter_kinds,
    weight_decay_mask as weight_decay_mask,
)
from ._placement import Placement as Placement
from ._report import comparison_table as comparison_table, plot_loss as plot_loss
from ._run_directory import RunDirectory as RunDirectory, load_run as load_run, open_run as open_run
from ._step import (
    LossFunction as LossFunction,
    TrainState as TrainState,
    init_state as init_state,
    make_train_step as make_train_step,
    state_leaf_names as state_leaf_names,
)
