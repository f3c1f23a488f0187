"""What decides the content of a prepared set, beside the inputs."""

import dataclasses

from fp4jax.data.errors import DataError

ANY_LANGUAGE = "any"


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes:
    tokenizer: as `fp4jax.data.load_tokenizer` takes it.
    text_key: key of the text in a line's object, name of the column, or feature of a TFDS data set.
    validation_fraction: of the documents, by a hash of their text.
    record_tokens: tokens in a record, which is what a random access reads.
    min_characters: shorter documents are dropped.
    max_characters: longer documents are dropped; it bounds the memory of a process.
    max_mojibake: the share of a document's characters that may be mojibake or control characters.
    language: the language that is kept, as CLD2 codes it, or "any".
    min_language_share: the share of a document's bytes that must be in that language.
    """

    tokenizer: str
    text_key: str
    validation_fraction: float
    record_tokens: int
    min_characters: int
    max_characters: int
    max_mojibake: float
    language: str
    min_language_share: float

    def __post_init__(self):
        requirements = [
            (0 <= self.validation_fraction < 1, "validation_fraction", "from 0 to below 1"),
            (self.record_tokens >= 1, "record_tokens", "at least 1"),
            (self.min_characters >= 1, "min_characters", "at least 1"),
            (self.max_characters >= self.min_characters, "max_characters", "at least min_characters"),
            (0 <= self.max_mojibake <= 1, "max_mojibake", "from 0 to 1"),
            (0 <= self.min_language_share <= 1, "min_language_share", "from 0 to 1"),
        ]
        for met, name, accepted in requirements:
            if not met:
                raise DataError(f"--{name}={getattr(self, name)}: must be {accepted}")
