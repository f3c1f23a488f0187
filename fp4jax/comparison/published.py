"""Other people's loss gaps, for orientation: their data, hardware, code and definition of the loss."""

from typing import NamedTuple


class Published(NamedTuple):
    """`gap`: loss gap to BF16 in per cent, as published."""

    recipe: str
    model: str
    gap: str
    source: str


PUBLISHED = (
    Published("averis", "Qwen3-0.6B, 100B tokens", "1.19", "arXiv 2603.10444 v2"),
    Published("nvfp4_hadamard", "Qwen3-0.6B, 100B tokens", "2.05", "arXiv 2603.10444 v2"),
    Published("averis", "Qwen3 7B-A1.5B, 50B tokens", "0.81", "arXiv 2603.10444 v2"),
    Published("nvfp4_hadamard", "Qwen3 7B-A1.5B, 50B tokens", "1.10", "arXiv 2603.10444 v2"),
    Published("nvfp4_hadamard", "30M / 100M / 200M", "3.42 / 2.53 / 2.27", "arXiv 2601.22813"),
    Published("tetrajet2", "30M / 100M / 200M", "2.86 / 2.28 / 2.02", "arXiv 2601.22813"),
    Published("quartet2", "30M / 100M / 200M", "2.76 / 2.14 / 1.89", "arXiv 2601.22813"),
    Published("metis", "LLaMA-3-8B, 100B tokens", "0.4", "arXiv 2509.00404"),
)
