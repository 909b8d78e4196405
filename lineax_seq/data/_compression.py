"""What general-purpose compressors need for a text: the baselines to print beside a language model's bits per byte."""

import bz2
import gzip
import lzma
from collections.abc import Iterable


def compression_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """`{"gzip -9": ..., "bzip2 -9": ..., "xz -9e": ...}`: compressed bits per byte of the UTF-8 texts put end to end.

    Each adapts to the text as it goes and has seen nothing before it. `xz -9e` takes about a second for 2 MB.

    Raises:
      ValueError: no text.
    """
    data = "".join(texts).encode()
    if not data:
        raise ValueError("compression_bits_per_byte: got no text, wants at least one that is not empty; give more.")
    compressed = {
        "gzip -9": gzip.compress(data, compresslevel=9, mtime=0),
        "bzip2 -9": bz2.compress(data, compresslevel=9),
        "xz -9e": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(result) / len(data) for name, result in compressed.items()}
