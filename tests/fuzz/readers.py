"""Every reader of files, with whole files to damage and the one error it may raise."""

import contextlib
import dataclasses
import gzip
import io
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from rich.console import Console

from fp4jax.analysis.health.numbers import describe, load_health
from fp4jax.checkpoint import Checkpointer, CheckpointError
from fp4jax.checksums import MANIFEST, FormatVersionError, find_damage, write_manifest
from fp4jax.comparison import report
from fp4jax.config import ConfigError, default_config
from fp4jax.config_checks import validate
from fp4jax.data import prepared
from fp4jax.data.corpus import DamagedCorpusError, TokenizedCorpus, write_corpus
from fp4jax.data.documents import SPLITS, BadLines
from fp4jax.data.errors import DataError
from fp4jax.data.gguf import GGUFFile, tokenizer_json
from fp4jax.data.json_files import parse_json
from fp4jax.data.prepare.inputs import Unit, documents_of, find_units
from fp4jax.data.prepare.options import Options
from fp4jax.data.prepare.run import prepare
from fp4jax.data.prepare.state import State
from fp4jax.data.prepared import PreparedSet
from fp4jax.data.sources import parse_sources
from fp4jax.data.tokenizers import load_tokenizer
from fp4jax.evaluation import task_data, tasks
from fp4jax.models import gguf, hf_folder
from fp4jax.models.pretrained import parameter_shapes
from fp4jax.models.saved_run import read_saved
from fp4jax.policy import PolicyFile, policy
from fp4jax.recipes import recipe
from fp4jax.training.divergence import read_events
from fp4jax.training.metrics import read_metrics
from fp4jax.training.schedule import phases
from tests.comparison.records import record
from tests.models import gguf_files, hf_folders

TEXTS = [f"Fellow citizens of the {name}, é — {name * 3}" for name in ("Senate", "House", "union", "people") * 4]
LINES = b"".join(json.dumps({"text": text, "url": f"u{i}"}).encode() + b"\n" for i, text in enumerate(TEXTS))
OPTIONS = Options(
    tokenizer="embedded", text_key="text", validation_fraction=0.2, record_tokens=16, min_characters=1,
    max_characters=100_000, max_mojibake=0.01, language="any", min_language_share=0.65,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """Attributes:
    write: puts whole files into a new folder.
    read: reads them.
    files: glob of those that are damaged, one at a time.
    error: what `read` may raise, in one line; one kind or several.
    is_json: the files are.
    names_file: the error must name the file.
    """

    write: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], object]
    files: str
    error: type[Exception] | tuple[type[Exception], ...] = DataError
    is_json: bool = False
    names_file: bool = False


def _documents(name: str) -> Callable[[pathlib.Path], object]:
    def read(folder: pathlib.Path) -> None:
        bad, count = BadLines(1.0), 0
        for document in documents_of(Unit(0, name, str(folder / name)), "text", bad):
            count += 1
            assert isinstance(document.text, str) and document.text
        assert count + bad.bad == bad.lines

    return read


def _shard(name: str, compress: Callable[[bytes], bytes]) -> Reader:
    return Reader(lambda folder: (folder / name).write_bytes(compress(LINES)), _documents(name), name)


def _write_parquet(folder: pathlib.Path) -> None:
    table = pa.table({"text": TEXTS, "n": range(len(TEXTS))})
    pq.write_table(table, folder / "a.parquet", row_group_size=8, compression="zstd")


def _prepare(folder: pathlib.Path, finished: bool = True) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "0.jsonl").write_bytes(LINES)
    # What is not compressed ends the preparation when one unit is done.
    (folder / "shards" / "1.jsonl.gz").write_bytes(gzip.compress(LINES) if finished else LINES)
    units = find_units(str(folder / "shards"), "train", None)
    console = Console(file=io.StringIO())
    with contextlib.nullcontext() if finished else contextlib.suppress(DataError):
        prepare(units, folder / "set", OPTIONS, workers=1, max_bad_fraction=0.0, console=console)
    assert (folder / "set" / ("index.json" if finished else "partial/unit-00000.json")).exists()


def _read_prepared(folder: pathlib.Path) -> None:
    opened = PreparedSet.open(folder / "set")
    for split in SPLITS:
        stream = opened.stream(split)
        assert len(stream[0 : len(stream)]) == len(stream)


def _read_large_prepared(folder: pathlib.Path) -> None:
    """As one of which the checksums are not compared."""
    before, prepared.CHECKED_BYTES = prepared.CHECKED_BYTES, -1
    try:
        _read_prepared(folder)
    finally:
        prepared.CHECKED_BYTES = before


def _read_state(folder: pathlib.Path) -> None:
    units = find_units(str(folder / "shards"), "train", None)
    state = State.of(folder / "set", OPTIONS, load_tokenizer("embedded"), units)
    if not state.is_finished():
        for unit in units:
            state.facts(unit)


def _write_cache(folder: pathlib.Path) -> None:
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "entry").mkdir()
    options = {"text_key": "text", "validation_fraction": 0.2, "max_bad_fraction": 0.0}
    write_corpus(folder / "entry", [folder / "a.jsonl"], load_tokenizer("embedded"), **options)


def _read_cache(folder: pathlib.Path) -> None:
    corpus = TokenizedCorpus.open(folder / "entry", 1.0)
    for split, facts in corpus.splits.items():
        assert len(corpus.stream(split)) == facts.tokens


def _write_gguf(folder: pathlib.Path) -> None:
    config, _, tensors = gguf_files.read_fixture()
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = gguf_files.metadata_of(config) | gguf_files.tokenizer_metadata(config["vocab_size"])
    gguf_files.write(folder / "a.gguf", metadata, tensors)


def _read_gguf(folder: pathlib.Path) -> None:
    file = GGUFFile(folder / "a.gguf")
    config = gguf.read_config(file, "float32")
    gguf.read_parameters(file, config, parameter_shapes(config))
    tokenizer_json(file)
    gguf.read_rest(file)


def _write_folder(folder: pathlib.Path) -> None:
    hf_folders.write_fixture(folder / "model", "qwen3_mha_untied", shards=2)


def _read_folder(folder: pathlib.Path) -> None:
    opened = hf_folder.open_folder(folder / "model", "float32")
    hf_folder.read_parameters(opened, parameter_shapes(opened.config))


def _write_item(folder: pathlib.Path) -> None:
    (folder / "item").mkdir()
    (folder / "item" / "array").write_bytes(b"abc")
    write_manifest(folder / "item")


def _read_item(folder: pathlib.Path) -> None:
    """As a checkpoint's item that is asked for: what is found is the refusal."""
    if damage := find_damage(folder / "item"):
        raise CheckpointError(damage)


def _json_lines(name: str, lines: list[dict]) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _json(name: str, value: object) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(value))


def _health_lines() -> list[dict]:
    summary = {"gradient_cosine": 0.5, "gradient_to_noise": 2.0, "loss_gap": None}
    table = {"sqnr_db/fprop.x/mlp.down_proj": [1.0, None], "cosine/wgrad/mlp.down_proj": [0.5, 0.6]}
    return [{"step": step} | summary | table for step in (10, 20)]


def _write_comparison(folder: pathlib.Path) -> None:
    declaration = {"baseline": "bf16", "primary": ["averis", "nvfp4"], "config": {"steps": 30}}
    runs = [dataclasses.asdict(record(recipe, 0, 5.0)) for recipe in ("bf16", "averis")]
    value = {"command": "c", "declaration": declaration, "missing_runs": 0, "runs": runs}
    (folder / report.NUMBERS).write_text(json.dumps(value))


def _write_config(folder: pathlib.Path) -> None:
    """A checkpoint without checksums, which would refuse every damage before it is read."""
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {"a": np.zeros(1)}, {"a": np.zeros(1)}, {}, default_config())
    for manifest in folder.rglob(MANIFEST):
        manifest.unlink()


def _read_config(folder: pathlib.Path) -> None:
    validate(read_saved(folder)[1], device_count=1)


def _read_names(folder: pathlib.Path) -> None:
    """The parts of a configuration that are languages of their own."""
    names = parse_json((folder / "names.json").read_bytes())
    for name, text in names.items() if isinstance(names, dict) else ():
        if isinstance(text, str) and name in _NAMES:
            _NAMES[name](text)


def _read_schedule(text: str) -> None:
    config = default_config()
    config.schedule = text
    phases(config)


_NAMES: dict[str, Callable[[str], object]] = {
    "recipe": recipe,
    "policy": lambda text: policy(text, "averis", ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]),
    "schedule": _read_schedule,
    "source": parse_sources,
}
_TASK = {"metrics": {"acc": {"value": 0.5, "stderr": 0.1}}, "documents": 2, "documents_in_set": 3}
_EVALUATION = {"settings": {"limit": None}, "about": {"recipe": "bf16", "model": "m"}, "tasks": {"piqa": _TASK}}


def _read_evaluation(folder: pathlib.Path) -> None:
    found = tasks._open(folder / "tasks.json", {"limit": None})
    if found["about"].get("recipe"):
        tasks.render(found)


def _read_health(folder: pathlib.Path) -> None:
    list(describe(load_health(folder)))


_PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}

READERS: dict[str, Reader] = {
    "shards, .jsonl": _shard("a.jsonl", bytes),
    "shards, .jsonl.gz": _shard("a.jsonl.gz", gzip.compress),
    "shards, .jsonl.zst": _shard(
        "a.jsonl.zst", lambda content: zstandard.ZstdCompressor(write_checksum=True).compress(content)
    ),
    "shards, .parquet": Reader(_write_parquet, _documents("a.parquet"), "a.parquet"),
    "index of a prepared set": Reader(_prepare, _read_prepared, "set/index.json", is_json=True),
    "ArrayRecord of a prepared set": Reader(_prepare, _read_prepared, "set/*.array_record"),
    "ArrayRecord without checksums": Reader(_prepare, _read_large_prepared, "set/*.array_record"),
    "state of a preparation": Reader(
        lambda folder: _prepare(folder, finished=False), _read_state, "set/partial/*.json", is_json=True
    ),
    "token cache": Reader(_write_cache, _read_cache, "entry/*", DamagedCorpusError),
    "facts of the token cache": Reader(_write_cache, _read_cache, "entry/corpus.json", DamagedCorpusError, True),
    "GGUF": Reader(_write_gguf, _read_gguf, "a.gguf"),
    "safetensors": Reader(_write_folder, _read_folder, "model/*.safetensors"),
    "config.json of a Hugging Face folder": Reader(_write_folder, _read_folder, "model/*.json", is_json=True),
    "tokenizer.json": Reader(
        lambda folder: (folder / "tokenizer.json").write_text(hf_folders.tokenizer_json()),
        lambda folder: load_tokenizer(folder / "tokenizer.json").encode("a b"),
        "tokenizer.json",
        is_json=True,
    ),
    "manifest of a checkpoint": Reader(
        _write_item, _read_item, f"item/{MANIFEST}", (CheckpointError, FormatVersionError), True
    ),
    "metrics.jsonl": Reader(
        _json_lines("metrics.jsonl", [{"step": step, "loss": 1.0} for step in (1, 10)]),
        read_metrics,
        "metrics.jsonl",
        ValueError,
        True,
        True,
    ),
    "health.jsonl": Reader(
        _json_lines("health.jsonl", _health_lines()), _read_health, "health.jsonl", ValueError, True, True
    ),
    "events.jsonl": Reader(
        _json_lines("events.jsonl", [{"event": "spike", "step": 2, "after": 1}] * 2),
        read_events,
        "events.jsonl",
        ValueError,
        True,
        True,
    ),
    "comparison.json": Reader(_write_comparison, report.read_numbers, report.NUMBERS, ValueError, True, True),
    "stored configuration": Reader(
        _write_config, _read_config, "checkpoints/1/config/metadata", (CheckpointError, ConfigError), True
    ),
    "names in a configuration": Reader(
        _json(
            "names.json",
            {
                "recipe": "averis+nearest",
                "policy": '[["mlp", "run"], ["attn|q", "bf16"]]',
                "schedule": "bf16:1%,run:80%,run+fwd_bf16:1000",
                "source": "a:0.7,b:3e-1",
            },
        ),
        _read_names,
        "names.json",
        ValueError,
        True,
    ),
    "policy file": Reader(
        lambda folder: PolicyFile((("mlp", "run"), (".", "bf16")), {"command": "c"}).save(folder / "policy.json"),
        lambda folder: PolicyFile.load(folder / "policy.json"),
        "policy.json",
        ValueError,
        True,
        True,
    ),
    "documents of a task": Reader(
        _json_lines("piqa.jsonl", [_PIQA] * 3),
        lambda folder: task_data.read_documents("piqa", folder / "piqa.jsonl"),
        "piqa.jsonl",
        ValueError,
        True,
        True,
    ),
    "record of an evaluation": Reader(
        _json("tasks.json", _EVALUATION), _read_evaluation, "tasks.json", ValueError, True, True
    ),
}
