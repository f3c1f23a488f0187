"""Timing: that everything asked for is run, as often as asked, in turns; and ratios of paired times."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ratios, timing
from tests.pallas_kernels import targets

SCRIPT = Path(__file__).with_name("compile_for_target.py")


def test_one_launch_runs_every_input():
    seen = []

    def program(x):
        return jax.pure_callback(lambda x: seen.append(float(x)) or np.asarray(x + 1), x, x)

    outputs = timing.over_all(program, passes=1)([(jnp.float32(i),) for i in range(3)])
    assert [float(x) for x in outputs] == [1, 2, 3]
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("passes", [3, 5])
def test_passes_give_the_outputs_of_one(passes):
    outputs = timing.over_all(lambda x, y: (x + y, x), passes)([(jnp.float32(i), jnp.float32(1)) for i in range(3)])
    assert jax.tree.map(float, outputs) == [(1, 0), (2, 1), (3, 2)]


def test_two_passes_are_refused():
    with pytest.raises(ValueError, match="would drop the second as a repetition"):
        timing.over_all(jnp.sin, passes=2)


@targets.compiles
@pytest.mark.parametrize("passes, calls", [(1, 4), (3, 8), (16, 8)])
def test_compiled_for_a_gpu_no_call_is_dropped_or_moved(passes, calls):
    """4 inputs: 4 calls before the loop, 4 in its body."""
    hlo = targets.run(SCRIPT, "h200", str(passes))
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == calls
    entry = hlo[hlo.index("\nENTRY") :]
    assert entry.count('custom_call_target="mosaic_gpu_v2"') == 4
    assert re.findall(r'known_trip_count":{"n":"(\d+)"}', hlo) == ([] if passes == 1 else [str(passes - 1)])
    assert not re.search(r"\w+\[(?!\])\S* copy\(", hlo)


def test_inputs_exceed_the_cache_and_launches_are_long(monkeypatch):
    assert timing.pass_count(2, 2**20) == 1
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    for size in (2**16, 2**23, 2**25, 2**29):
        inputs = timing.input_count(size)
        passes = timing.pass_count(inputs, size)
        assert inputs >= 2 and passes >= 1 and passes != 2
        assert inputs * passes <= 3 * 32
        if size >= 2**23:
            assert inputs * size >= timing.WORKING_SET
    assert timing.pass_count(32, 2**23) == 3


def test_turns_run_all_programs_each_time_another_one_first():
    order, after = [], []
    runs = {name: (lambda name=name: order.append(name) or jnp.zeros(())) for name in "abc"}
    seconds = timing.in_turns(runs, repeats=3, launches=2, after_turn=lambda s: after.append(len(s["a"])))
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert after == [1, 2, 3]
    assert all(time > 0 for times in seconds.values() for time in times)


def test_the_launches_of_a_turn_are_divided_out():
    ticks = iter(range(100))
    seconds = timing.in_turns({"a": lambda: jnp.zeros(())}, repeats=2, launches=5, clock=lambda: 10.0 * next(ticks))
    assert seconds == {"a": [2.0, 2.0]}


def test_medians():
    assert timing.medians({"a": [1.0, 9.0, 2.0], "b": [4.0]}) == {"a": 2.0, "b": 4.0}


def test_ratios_are_of_times_in_one_turn():
    drifting = np.exp(np.linspace(0, 3, 20))
    found = ratios.paired_ratio(list(1.1 * drifting), list(drifting))
    assert found == pytest.approx({"ratio": 1.1, "low": 1.1, "high": 1.1})


def test_the_interval_holds_the_ratio_and_narrows_with_more_turns():
    rng = np.random.default_rng(1)
    widths = []
    for turns in (10, 1000):
        found = ratios.paired_ratio(list(2 + 0.1 * rng.standard_normal(turns)), [1.0] * turns)
        assert found["low"] <= found["ratio"] <= found["high"]
        assert found["low"] < 2 < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < widths[0] / 3


@pytest.mark.parametrize("times, reference", [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_times_are_refused(times, reference):
    with pytest.raises(ValueError, match=f"got {len(times)} and {len(reference)}"):
        ratios.paired_ratio(times, reference)
