"""Tokenizers: round trips, special tokens, saving, and what is refused."""

import copy
import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer as HuggingFaceTokenizer

from lineax_seq.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

PROSE = ["The quick brown fox jumps over the lazy dog. " * 4, "Und der schnelle braune Fuchs: façade, naïve.\n" * 3]


def random_texts(seed=0):
    rng = np.random.default_rng(seed)
    yield from (bytes(rng.integers(0, 256, 200, dtype=np.uint8)).decode("latin-1") for _ in range(5))
    yield from (bytes(rng.integers(0, 256, 200, dtype=np.uint8)).decode("utf-8", "replace") for _ in range(5))
    points = [i for i in rng.integers(0, 0x110000, 400).tolist() if not 0xD800 <= i < 0xE000]
    yield "".join(map(chr, points))


TEXTS = [
    "",
    " ",
    "a",
    "  two  spaces \t\r\n\n tabs\u2028 and\u00a0more \x00 ",
    "naïve façade 東京 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
    "<|bos|> written out <|pad|>, <|endoftext|>",
    "don't we'll 12345 x=1;",
    *random_texts(),
]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(PROSE, 300, progress=False)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_decode_of_encode_is_the_text(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32 and ids.ndim == 1
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert not np.isin(ids, [tokenizer.bos_id, tokenizer.pad_id]).any()
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids.tolist(), tokenizer.pad_id]) == text


def test_specials_are_two_ids_within_the_vocabulary(tokenizer):
    assert len({tokenizer.bos_id, tokenizer.pad_id}) == 2
    assert (
        0 <= min(tokenizer.bos_id, tokenizer.pad_id) and max(tokenizer.bos_id, tokenizer.pad_id) < tokenizer.vocab_size
    )


def test_a_character_cut_in_two_decodes_to_the_replacement_character(tokenizer):
    ids = tokenizer.encode("\u6771")  # three bytes, and no merge in either tokenizer
    assert len(ids) == 3 and "\ufffd" in tokenizer.decode(ids[:2])


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    members = ("vocab_size", "bos_id", "pad_id")
    assert [getattr(again, name) for name in members] == [getattr(tokenizer, name) for name in members]
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
        assert again.decode(again.encode(text)) == text
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def saved_and_loaded(tokenizer, folder):
    tokenizer.save(folder / "tokenizer.json")
    return load_tokenizer(folder / "tokenizer.json")


COPIES = {
    "pickle": lambda tokenizer, folder: pickle.loads(pickle.dumps(tokenizer)),
    "old pickle": lambda tokenizer, folder: pickle.loads(pickle.dumps(tokenizer, protocol=2)),
    "deepcopy": lambda tokenizer, folder: copy.deepcopy(tokenizer),
    "copy": lambda tokenizer, folder: copy.copy(tokenizer),
    "file": saved_and_loaded,
    "deepcopy of a pickle": lambda tokenizer, folder: copy.deepcopy(pickle.loads(pickle.dumps(tokenizer))),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_encodes_alike(tokenizer, name, tmp_path):
    """Text that spells a special token stays text, whatever way the tokenizer came here."""
    before = [tokenizer.encode(text) for text in TEXTS]
    again = COPIES[name](tokenizer, tmp_path)
    for one in (again, tokenizer):  # the original is as it was
        assert one.decode(one.encode("<|bos|> x")) == "<|bos|> x" and one.bos_id not in one.encode("<|bos|> x")
        for text, ids in zip(TEXTS, before, strict=True):
            np.testing.assert_array_equal(one.encode(text), ids)
    members = ("vocab_size", "bos_id", "pad_id", "fingerprint")
    assert [getattr(again, member) for member in members] == [getattr(tokenizer, member) for member in members]
    assert type(again) is type(tokenizer)


def test_a_copy_of_a_loaded_tokenizer_keeps_its_names(bpe, tmp_path):
    """Padding and truncation stay off, and special tokens of unusual names stay known."""
    other = HuggingFaceTokenizer.from_str(json.dumps(json.loads(bpe._to_json()) | {"added_tokens": []}))
    other.add_special_tokens([AddedToken("<|mine|>", special=True)])
    other.enable_truncation(4)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json", bos_token="<|mine|>")
    for again in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        np.testing.assert_array_equal(again.encode("<|mine|> and more"), loaded.encode("<|mine|> and more"))
        assert again.decode(again.encode("<|mine|> and more")) == "<|mine|> and more"
        assert (again.bos_id, again.fingerprint) == (loaded.bos_id, loaded.fingerprint)


def test_ids_of_any_kind_are_decoded(tokenizer):
    ids = tokenizer.encode("some text")
    for kind in (list, tuple, iter, np.int64, np.uint8 if ids.max() < 256 else np.uint16, jnp.asarray):
        made = ids.astype(kind) if isinstance(kind, type) and issubclass(kind, np.integer) else kind(ids)
        assert tokenizer.decode(made) == "some text"
    assert tokenizer.decode([]) == tokenizer.decode(iter(())) == ""


def test_training_is_deterministic_and_obeys_the_size(bpe):
    again = BPETokenizer.train(PROSE, 300, progress=False)
    assert again.fingerprint == bpe.fingerprint and bpe.vocab_size == 300
    assert BPETokenizer.train(PROSE, 290, progress=False).fingerprint != bpe.fingerprint
    assert len(bpe.encode(PROSE[0])) < len(PROSE[0]) / 2  # it did learn merges


def test_long_texts_are_encoded_in_pieces_without_loss(bpe, monkeypatch):
    text = "a line é\n" * 30 + "x" * 100 + "\n\n tail"
    whole = bpe.encode(text)
    monkeypatch.setattr("lineax_seq.data._bpe._PIECE", 40)
    assert bpe.decode(bpe.encode(text)) == text
    lines = text[: 30 * 9]
    np.testing.assert_array_equal(bpe.encode(lines), whole[: len(bpe.encode(lines))])  # cut after line ends only
    assert BPETokenizer.train(PROSE, 280, progress=False).vocab_size == 280


def test_another_programs_file_is_loaded(bpe, tmp_path):
    """As published: its own special tokens, a template that adds one, padding and truncation switched on."""
    content = json.loads(bpe._to_json())
    path = tmp_path / "tokenizer.json"
    other = HuggingFaceTokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    other.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.bos_id == loaded.pad_id == other.token_to_id("<|endoftext|>") == loaded.vocab_size - 1
    for text in TEXTS:
        assert loaded.decode(loaded.encode(text)) == text

    other.add_special_tokens([AddedToken("<|mine|>", special=True)])
    other.save(str(path))
    named = BPETokenizer.load(path, bos_token="<|mine|>")
    assert named.bos_id == other.token_to_id("<|mine|>") and named.fingerprint != loaded.fingerprint
    named.save(tmp_path / "named.json")
    again = load_tokenizer(tmp_path / "named.json")
    assert (again.bos_id, again.pad_id, again.fingerprint) == (named.bos_id, named.pad_id, named.fingerprint)


def test_bad_input_is_refused_with_a_remedy(tokenizer, tmp_path):
    for text in (None, b"bytes", 5):
        with pytest.raises(ValueError, match=f"encode: text is {type(text).__name__}, wants str"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="surrogate pair"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match=f"ids run from -1 to 5, wants 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([-1, 5])
    with pytest.raises(ValueError, match="ids run from"):
        tokenizer.decode(np.array([tokenizer.vocab_size]))
    with pytest.raises(ValueError, match="ids are float64, wants integers"):
        tokenizer.decode([0.5])


def test_bad_sizes_and_files_are_refused(bpe, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100, wants an integer of at least 258"):
        BPETokenizer.train(PROSE, 100)
    with pytest.raises(
        ValueError, match=r"vocab_size=400, but .*for 2\d\d ids only; give more text, or vocab_size=2\d\d"
    ):
        BPETokenizer.train(["ab ab ab"], 400, progress=False)
    with pytest.raises(ValueError, match="no file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ("[" * 200_000, "not JSON"),
        ("\0" * 99, "not JSON"),
        ('{"a": 1}', "no tokenizer.json"),
        ('{"model": {"type": "BPE"}}', "no tokenizer.json"),
        ('{"huggingface": 5}', "no tokenizer.json"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / "bad.json")
    bpe.save(tmp_path / "good.json")
    specials = r"wants one of the special tokens \['<\|bos\|>', '<\|pad\|>'\]"
    with pytest.raises(ValueError, match=f"bos_token='<s>'.* is no token, {specials}"):
        BPETokenizer.load(tmp_path / "good.json", bos_token="<s>")
    nameless = json.loads((tmp_path / "good.json").read_text()) | {"added_tokens": []}
    (tmp_path / "nameless.json").write_text(json.dumps(nameless))
    with pytest.raises(ValueError, match="none of which is known to separate.*bos_token="):
        load_tokenizer(tmp_path / "nameless.json")
