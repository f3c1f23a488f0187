"""Timing: that everything asked for is run, as often as asked, in turns; and ratios of paired times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ratios, timing


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_one_launch_runs_every_input_in_every_pass(passes):
    seen = []

    def program(x):
        return jax.pure_callback(lambda x: seen.append(float(x)) or np.asarray(x + 1), x, x)

    outputs = timing.over_all(program, passes)([(jnp.float32(i),) for i in range(3)])
    assert [float(x) for x in outputs] == [1, 2, 3]
    assert sorted(seen) == sorted([0.0, 1.0, 2.0] * passes)


@pytest.mark.parametrize("passes", [1, 3])
def test_no_call_is_removed_as_a_repetition(passes):
    text = timing.over_all(lambda x: jnp.sin(x), passes).lower([(jnp.ones(1000),)] * 2).compile().as_text()
    assert text.count(" sine(") == (2 if passes == 1 else 4)  # and again in the loop's body
    assert ("while(" in text) == (passes > 1)


def test_inputs_exceed_the_cache_and_launches_are_long():
    for size in (2**16, 2**23, 2**25, 2**29):
        inputs = timing.input_count(size)
        passes = timing.pass_count(inputs, size)
        assert inputs >= 2 and passes >= 1 and inputs * passes <= timing._MAX_CALLS
        if size >= 2**23:
            assert inputs * size >= timing.WORKING_SET
    assert timing.pass_count(32, 2**23) == 2


def test_turns_run_all_programs_each_time_another_one_first():
    order, after = [], []
    runs = {name: (lambda name=name: order.append(name) or jnp.zeros(())) for name in "abc"}
    seconds = timing.in_turns(runs, repeats=3, launches=2, after_turn=lambda s: after.append(len(s["a"])))
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert after == [1, 2, 3]
    assert all(time > 0 for times in seconds.values() for time in times)


def test_the_launches_of_a_turn_are_divided_out(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 10.0 * next(clock))
    assert timing.in_turns({"a": lambda: jnp.zeros(())}, repeats=2, launches=5) == {"a": [2.0, 2.0]}


def test_medians():
    assert timing.medians({"a": [1.0, 9.0, 2.0], "b": [4.0]}) == {"a": 2.0, "b": 4.0}


def test_ratios_are_of_times_in_one_turn():
    drifting = np.exp(np.linspace(0, 3, 20))
    found = ratios.paired_ratio(list(1.1 * drifting), list(drifting))
    assert found == pytest.approx({"ratio": 1.1, "low": 1.1, "high": 1.1})


def test_the_interval_holds_the_ratio_and_narrows_with_more_turns():
    rng = np.random.default_rng(0)
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
