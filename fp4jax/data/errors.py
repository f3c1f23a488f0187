"""The one error of this package."""


class DataError(ValueError):
    """Data, a tokenizer or a data setting that cannot be used; one line: what was given, is accepted, can be done."""
