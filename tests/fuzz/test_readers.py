"""Damaged files and random text, for every reader; `python -m tests.fuzz` gives 10,000 to each."""

import os
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp4jax.data.errors import DataError
from fp4jax.data.shards import find_shards
from tests.fuzz.damage import changes
from tests.fuzz.fuzzing import Stage
from tests.fuzz.readers import READERS

fuzz = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name, tmp_path):
    stage = Stage(READERS[name], tmp_path)

    @fuzz
    @given(st.integers(0, 9), changes(READERS[name].is_json))
    def read(number, made):
        stage.read_damaged(number, made)

    read()


# Lines of a shard that are no JSON are counted, and refused when they are too many.
TOLERANT = {"shards, .jsonl"}


@pytest.mark.parametrize("name", READERS)
def test_garbage_in_any_file_is_refused(name, tmp_path):
    stage = Stage(READERS[name], tmp_path)
    for number, path in enumerate(stage.files):
        refused = stage.read_damaged(number, [("file", 0, b"garbage\n")])
        assert bool(refused) != (name in TOLERANT), path


# Names from the root or the home folder would search the whole machine.
RELATIVE = st.text(alphabet="abc/*[]?{}~\0\n ", max_size=12).filter(lambda name: not name.startswith(("/", "~")))


@fuzz
@given(RELATIVE)
def test_source_names_give_shards_or_one_error(tmp_path, name):
    previous = pathlib.Path.cwd()
    os.chdir(tmp_path)
    try:
        find_shards(name)
    except DataError as error:
        assert "\n" not in str(error)
    finally:
        os.chdir(previous)
