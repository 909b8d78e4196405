"""What models are trained on, each a `Task` of `lineax_seq.training`.

run = Run(config, TextTask(config))          # config = TextConfig(HybridConfig(vocab_size=4096, ...), ...)
result = run.train()
"""

from ..models import HybridConfig as HybridConfig
from ._decoder import DecoderTask as DecoderTask
from ._text_config import (
    DataConfig as DataConfig,
    TextConfig as TextConfig,
    TextTrainingConfig as TextTrainingConfig,
)
from .recall import (
    RecallConfig as RecallConfig,
    RecallData as RecallData,
    RecallTask as RecallTask,
    plot_accuracy as plot_accuracy,
    recall_row as recall_row,
)
from .text import (
    TextTask as TextTask,
    comparison_table as comparison_table,
    load_language_model as load_language_model,
    plot_loss as plot_loss,
)
