"""The whole preparation: the units that are not done go to the processes, then the index is written."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.sharedctypes import SynchronizedArray

import numpy as np
from rich.console import Console

from fp4jax.data.documents import SPLITS
from fp4jax.data.errors import DataError
from fp4jax.data.json_files import one_line
from fp4jax.data.packing import token_dtype
from fp4jax.data.prepare.filters import Filters
from fp4jax.data.prepare.inputs import Unit
from fp4jax.data.prepare.options import Options
from fp4jax.data.prepare.progress import Bar, Counters
from fp4jax.data.prepare.report import Report, add_drops
from fp4jax.data.prepare.state import REPORT, State, UnitFacts, decompress_counts, write_whole
from fp4jax.data.prepare.unit import prepare_unit
from fp4jax.data.prepared import INDEX, PreparedSet, PreparedSplit
from fp4jax.data.statistics import unigram_entropy
from fp4jax.data.tokenizers import load_tokenizer

SHOW_SECONDS = 0.5


def prepare(
    units: Sequence[Unit],
    output: pathlib.Path,
    options: Options,
    *,
    workers: int,
    max_bad_fraction: float,
    console: Console,
) -> Report:
    """Prepares a set, or goes on with one; returns the report, an old one if the set was finished before.

    Args:
      units: of `find_units`.
      output: folder of the set: a new one, an empty one, or one with the same options and inputs.
      options: what decides the content.
      workers: processes; 1 works in this one.
      max_bad_fraction: the fraction of the records that may hold no document.

    Raises:
      DataError: something cannot be used or read; what was finished is kept, and the same call goes on from there. If
        the filters left nothing, nothing is kept.
      OSError: the output cannot be written.
    """
    started = time.monotonic()
    if workers < 1:
        raise DataError(f"--workers={workers}: must be at least 1")
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"--max_bad_fraction={max_bad_fraction}: must be from 0 to 1")
    tokenizer = load_tokenizer(options.tokenizer)
    filters = Filters(options)
    state = State.of(output, options, tokenizer, units)
    if not state.is_finished():
        with state.started():
            pending = [unit for unit in units if state.facts(unit) is None]
            counters = Counters()
            with Bar(console, counters, len(units), len(units) - len(pending)) as bar:
                if workers == 1:
                    for unit in pending:
                        prepare_unit(unit, state, tokenizer, filters, max_bad_fraction, _counted(counters, bar))
                        bar.unit_done()
                elif pending:
                    _in_processes(pending, state, min(workers, len(pending)), max_bad_fraction, counters, bar)
            _finish(state, max_bad_fraction, workers, started)
    try:
        report = Report.from_json((output / REPORT).read_bytes())
    except ValueError as error:
        raise DataError(f"{output / REPORT} is damaged ({one_line(error)}); the set itself is whole") from error
    if state.partial.exists():
        shutil.rmtree(state.partial)
    return report


def _counted(counters: Counters, bar: Bar):
    def counted(documents: int, tokens: int, text_bytes: int) -> None:
        counters.add(documents, tokens, text_bytes)
        bar.show()

    return counted


def _in_processes(
    pending: Sequence[Unit], state: State, workers: int, max_bad_fraction: float, counters: Counters, bar: Bar
) -> None:
    # Spawned, not forked: the tokenizers' threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    start = (state, max_bad_fraction, counters.values, os.getpid())
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, start) as pool:
        running = {pool.submit(_work, unit) for unit in pending}
        try:
            while running:
                done, running = concurrent.futures.wait(
                    running, SHOW_SECONDS, concurrent.futures.FIRST_COMPLETED
                )  # fmt: skip
                for future in done:
                    future.result()
                    bar.unit_done()
                bar.show()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; run the same command again to go on, "
                "with fewer --workers if it happens again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker: tuple = ()


def _start_worker(state: State, max_bad_fraction: float, counts: SynchronizedArray, parent: int) -> None:
    """Once in every process."""
    global _worker
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    tokenizer, filters = load_tokenizer(state.options.tokenizer), Filters(state.options)
    _worker = (state, tokenizer, filters, max_bad_fraction, Counters(counts).add)


def _leave_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: nobody waits for its work, and the next run does it."""
    while os.getppid() == parent:
        time.sleep(SHOW_SECONDS)
    os._exit(1)


def _work(unit: Unit) -> None:
    prepare_unit(unit, *_worker)


def _finish(state: State, max_bad_fraction: float, workers: int, started: float) -> None:
    """Writes the report, and then the index, which makes the set one that can be read."""
    facts = [state.facts(unit) for unit in state.units]
    read, bad = sum(unit.documents_read for unit in facts), sum(unit.bad for unit in facts)
    if bad > max_bad_fraction * read:
        first = next(unit.first_bad for unit in facts if unit.first_bad)
        raise DataError(
            f"{bad:,} of {read:,} records hold no document, more than --max_bad_fraction={max_bad_fraction:g} allows; "
            f"the first is {first}; mend the input, set --text_key (with another --output), or raise --max_bad_fraction"
        )
    prepared = PreparedSet(
        folder=state.output,
        tokenizer=state.tokenizer,
        dtype=token_dtype(state.tokenizer["vocab_size"]),
        record_tokens=state.options.record_tokens,
        options=dataclasses.asdict(state.options),
        inputs=tuple({"name": unit.name, "bytes": unit.bytes} for unit in state.units),
        documents_read=read,
        drops=add_drops(facts),
        splits={split: _split(split, facts, state.tokenizer["vocab_size"]) for split in SPLITS},
    )
    if not prepared.splits["train"].documents:
        state.forget_units()  # they are of no use, and would refuse the other filters that are to be tried
        raise DataError(
            f"of {read:,} documents none is left to train on ({json.dumps(prepared.drops)}); "
            "loosen these filters, or give another --source"
        )
    report = Report.of(prepared, facts, time.monotonic() - started, workers)
    write_whole(state.output / REPORT, report.to_json())
    write_whole(state.output / INDEX, prepared.index_json())


def _split(split: str, facts: Iterable[UnitFacts], vocab_size: int) -> PreparedSplit:
    counts, shards = np.zeros(vocab_size, np.int64), []
    for unit in facts:
        shard = unit.shards[split]
        if shard is not None:
            shards.append(shard)
            counts += decompress_counts(unit.counts[split])
    return PreparedSplit(tuple(shards), unigram_entropy(counts))
