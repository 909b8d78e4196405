"""Continue a text with a trained model, token by token as it is drawn.

Question   What does the model of a run write?
Command    python -m experiments.generate RUN_DIR --prompt "My fellow citizens" --temperature 0.8
Hardware   Anything; one CPU core suffices. A token costs the same wherever it stands, but for softmax layers.
Expected   English in the manner of the training text.
Measured   Not a measurement.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from lineax_seq.models import generate
from lineax_seq.tasks import load_language_model
from lineax_seq.training import plain_output, sentence


@dataclass(frozen=True)
class Flags:
    """Continue a text with a trained model."""

    run_dir: tyro.conf.Positional[str]
    """Run directory that training printed, such as runs/sotu-LLLN-gated_delta_net."""
    prompt: str = ""
    """Text to continue; none begins a document."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 256
    """Tokens to write, fewer if the document ends."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens; None: all."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to this; None: all."""
    seed: int = 0
    """Of the draws."""
    step: int | None = None
    """Checkpoint; None: the newest."""


def stream(tokenizer, write):
    """A function that takes tokens one at a time and writes the text that has become certain."""
    tokens: list[int] = []
    written = 0

    def take(token: int | None, last: bool = False) -> None:
        nonlocal written
        if token is not None:
            tokens.append(token)
        text = tokenizer.decode(tokens)
        # U+FFFD at the end: the first bytes of a character whose other bytes are in the next token.
        certain = len(text) if last else len(text.rstrip("\ufffd"))
        if certain > written:
            write(text[written:certain])
            written = certain

    return take


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 if the run, its checkpoint or an option is refused, 141 if nobody reads the text any more."""
    with plain_output():
        flags = tyro.cli(Flags, args=args, prog="python -m experiments.generate", description=__doc__.splitlines()[0])
        try:
            write(flags)
        except (ValueError, NotImplementedError) as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 2
    return 0


def write(flags: Flags) -> None:
    model, tokenizer, step = load_language_model(flags.run_dir, flags.step)
    print(f"step {step} of {flags.run_dir}", file=sys.stderr)
    take = stream(tokenizer, lambda text: print(text, end="", flush=True))
    print(flags.prompt, end="", flush=True)
    generate(
        model,
        [[tokenizer.bos_id, *tokenizer.encode(flags.prompt).tolist()]],
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        stop_tokens=[tokenizer.bos_id],
        seed=flags.seed,
        on_token=lambda tokens: take(tokens[0]),
    )
    take(None, last=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
