"""CLIP's tokenizer against that of transformers, and damaged files of it."""

import json
import warnings

import numpy as np
import pytest
from clip_recipe import texts
from helpers import GOLDEN

from tstitch_jax.models import tokenizer
from tstitch_jax.models.tokenizer import make_tokenizer, read_tokenizer

FOLDER = GOLDEN / "clip_tiny" / "tokenizer"


@pytest.fixture(scope="module")
def files():
    return read_tokenizer(FOLDER)


def whole_file(files, **changes) -> bytes:
    """The same as one ``tokenizer.json``."""
    vocabulary = json.loads(files["vocab.json"])
    merges = files["merges.txt"].decode().split("\n")[1:-1]
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "merges": merges} | changes
    model["vocab"] = {k: v for k, v in vocabulary.items() if v < len(vocabulary) - 1}
    added = [{"id": len(vocabulary) - 1, "content": "<|endoftext|>"}]
    return json.dumps({"model": model, "added_tokens": added}).encode()


@pytest.mark.filterwarnings("ignore:a text of")
@pytest.mark.parametrize("layout", ["pair", "whole", "whole with pairs"])
def test_against_transformers(files, layout):
    if layout != "pair":
        merges = [line.split(" ") for line in files["merges.txt"].decode().split("\n")[1:-1]]
        changes = {"merges": merges} if layout == "whole with pairs" else {}
        files = {"tokenizer.json": whole_file(files, **changes)}
    made = make_tokenizer(files, 77)
    with np.load(GOLDEN / "clip_tiny" / "expected.npz") as stored:
        expected = stored["ids"]
    ids = made.encode(texts())
    assert (ids.dtype, ids.shape) == (np.int32, (1000, 77))
    np.testing.assert_array_equal(ids, expected)
    assert made.size == 814
    assert len(np.unique(expected)) > 400  # the texts use the vocabulary


def test_what_is_left_out_is_named(files):
    made = make_tokenizer(files, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = made.encode(["a PHOTOGRAPH  of an house"])
    words = [json.loads(files["vocab.json"])[f"{w}</w>"] for w in ("a", "photograph", "of", "an")]
    assert ids[0, 1:5].tolist() == words
    # The offsets are those of the text as it was given.
    with pytest.warns(UserWarning, match=r"a text of 10 tokens is cut to 6; left out: 'IN  Snow'$"):
        made.encode(["fox", "A  Photograph of\tan house, IN  Snow"])


def test_padding_is_what_the_files_say(files):
    made = make_tokenizer({**files, "special_tokens_map.json": b'{"pad_token": "!"}'}, 77)
    assert made.encode(["a"])[0, -1] == 813  # the first file that says it
    settings = b'{"pad_token": {"content": "!"}}'
    padded = make_tokenizer({**files, "tokenizer_config.json": settings}, 77).encode(["a"])
    assert padded[0, :4].tolist() == [812, json.loads(files["vocab.json"])["a</w>"], 813, 0]
    unsaid = {name: files[name] for name in ("vocab.json", "merges.txt")}
    assert make_tokenizer(unsaid, 77).encode(["a"])[0, -1] == 813


def test_other_texts_are_refused(files):
    made = make_tokenizer(files, 77)
    for bad in ("a text", [b"bytes"], ["a", None]):
        with pytest.raises(ValueError, match="texts must be a list of texts, got"):
            made.encode(bad)
    with pytest.raises(ValueError, match="a text is no UTF-8: 'a"):
        made.encode(["a\ud800"])
    assert made.encode([]).shape == (0, 77)


def test_folders(files, tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer: expected vocab\.json and merges\.txt"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_bytes(files["vocab.json"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole_file(files))
    assert read_tokenizer(tmp_path).keys() == {"tokenizer.json"}
    (tmp_path / "merges.txt").write_bytes(files["merges.txt"])
    assert read_tokenizer(tmp_path).keys() == {"vocab.json", "merges.txt"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab.json": b"{"}, "vocab.json is damaged or no JSON"),
        ({"vocab.json": b"[]"}, "vocab.json must hold a JSON object, got list"),
        ({"vocab.json": b'{"a": 0, "b": 2}'}, "must number its tokens from 0, each once"),
        ({"vocab.json": b'{"a": "0"}'}, "must number its tokens from 0, each once"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b""}, r"has no <\|startoftext\|>"),
        ({"merges.txt": b"#version\nt\n"}, r"must be pairs, got \('t',\)"),
        ({"merges.txt": b"\xff"}, "merges.txt is damaged"),
        ({"merges.txt": b"zz yy"}, "the merges do not fit the vocabulary"),
        ({"tokenizer_config.json": b'{"pad_token": "<pad>"}'}, "vocabulary has no <pad>"),
        ({"tokenizer_config.json": b"nothing"}, "tokenizer_config.json is damaged"),
    ],
)
def test_damage(files, change, text):
    with pytest.raises(ValueError, match=text):
        make_tokenizer({**files, **change}, 77)


def test_other_kinds_are_refused(files):
    for changes in ({"type": "Unigram"}, {"end_of_word_suffix": ""}, {"merges": None}):
        with pytest.raises(ValueError, match="another kind of tokenizer than CLIP's"):
            make_tokenizer({"tokenizer.json": whole_file(files, **changes)}, 77)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        make_tokenizer({"tokenizer.json": whole_file(files, merges=[3])}, 77)


def test_files_that_are_read():
    assert tokenizer.read_tokenizer(FOLDER).keys() == {
        "vocab.json", "merges.txt", "tokenizer_config.json"
    }  # fmt: skip
