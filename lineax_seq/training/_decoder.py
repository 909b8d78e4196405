"""A `Decoder` as the training loop sees it: nested dictionaries of parameters and a loss function."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from ..data import Tokenizer, load_tokenizer
from ..models import Decoder, DecoderConfig, HybridConfig
from ._checkpoint import load_params
from ._config import LanguageModelConfig
from ._run_directory import load_run
from ._step import LossFunction

PyTree = Any


def init_params(config: DecoderConfig | HybridConfig, seed: int) -> PyTree:
    """The parameters of a new `Decoder` as nested dictionaries."""
    # Not jitted: compiling all draws as one program takes longer than they do one by one.
    return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))[1])


def decoder_loss(
    graphdef: nnx.GraphDef, *, segments: bool, chunk_size: int | None, axis_name: str | None = None
) -> LossFunction:
    """The loss function of a `Decoder`, split into `graphdef` and pure-dict parameters.

    `segments=False` leaves out segment ids and positions: each row is then one text. `axis_name` as in `Decoder.loss`.
    """

    def loss(params, batch, rng):
        model = nnx.merge(graphdef, params)
        given: dict[str, Any] = {name: batch[name] for name in ("segment_ids", "positions")} if segments else {}
        given |= dict(chunk_size=chunk_size, axis_name=axis_name)
        return model.loss(batch["inputs"], batch["targets"], batch["loss_weights"], **given)

    return loss


def load_language_model(run_dir: str | Path, step: int | None = None) -> tuple[Decoder, Tokenizer, int]:
    """Model, tokenizer and step of a run's checkpoint `step` (None: the newest), on the first device.

    Raises:
      ValueError: no such run, or no such checkpoint in it.
    """
    run = load_run(run_dir, LanguageModelConfig)
    graphdef, like = nnx.split(nnx.eval_shape(lambda: Decoder(run.config.model, rngs=nnx.Rngs(0))))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = nnx.to_pure_dict(like)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    step, params = load_params(run.checkpoints, like, step)
    return nnx.merge(graphdef, params), load_tokenizer(run.path / "tokenizer.json"), step
