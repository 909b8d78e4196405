"""Refusals before tracing: every layer and model checks its static arguments through these."""

import jax.numpy as jnp


def check_positive(caller: str, **sizes: int | None) -> None:
    """Every given size is an int of at least 1; None means "not given".

    Raises:
        ValueError: all sizes that are not.
    """
    wrong = [f"{name}={n!r}" for name, n in sizes.items() if n is not None and (type(n) is not int or n < 1)]
    if wrong:
        raise ValueError(f"{caller}: {', '.join(wrong)}, wants whole numbers of at least 1.")


def check_tokens(caller: str, x, width: int, segment_ids=None, positions=None) -> None:
    """`x [B, T, width]`, `segment_ids [B, T]` integer, `positions` integer and broadcastable to `[B, T]`.

    Raises:
        ValueError: all arguments that do not fit.
    """
    problems = []
    if x.ndim != 3 or x.shape[-1] != width or 0 in x.shape:
        problems.append(f"x has shape {list(x.shape)}, wants [B, T, {width}] with B, T >= 1")
    for name, a in (("segment_ids", segment_ids), ("positions", positions)):
        if a is None:
            continue
        shape, dtype = jnp.shape(a), jnp.result_type(a)
        if not jnp.issubdtype(dtype, jnp.integer):
            problems.append(f"{name} is {dtype}, wants int32 (cast it)")
        fits = shape == x.shape[:2] or (name == "positions" and shape in ((x.shape[1],), (1, x.shape[1])))
        if not fits:
            problems.append(f"{name} has shape {list(shape)}, wants {list(x.shape[:2])}: one per token")
    if problems:
        raise ValueError(f"{caller}: {'; '.join(problems)}.")


def check_lengths(caller: str, lengths, batch: int) -> None:
    """`lengths [B]` integer: how many tokens of each right-padded row are real.

    Raises:
        ValueError: another shape or dtype.
    """
    if lengths is None:
        return
    shape, dtype = jnp.shape(lengths), jnp.result_type(lengths)
    if shape != (batch,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{caller}: lengths is {dtype}{list(shape)}, wants int32[{batch}]: the number of real tokens of each row, "
            "padding on the right."
        )
