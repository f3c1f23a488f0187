import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fp4jax.training.divergence import EventLog, SpikeDetector, finite_or_former, read_events


@pytest.mark.parametrize(("loss", "norm", "skipped"), [(1, 2, 0), (np.nan, 2, 1), (1, np.inf, 1), (-np.inf, np.nan, 1)])
def test_update_is_made_only_if_finite_and_the_schedule_goes_on(loss, norm, skipped):
    new = {"weight": jnp.ones(3)}, (optax.ScaleByScheduleState(jnp.int32(6)), {"mu": jnp.full(3, np.nan)})
    former = {"weight": jnp.zeros(3)}, (optax.ScaleByScheduleState(jnp.int32(5)), {"mu": jnp.full(3, 4.0)})
    chosen, flag = jax.jit(finite_or_former)(jnp.float32(loss), jnp.float32(norm), new, former)
    (params, (schedule, moments)), expected = chosen, former if skipped else new
    np.testing.assert_array_equal(params["weight"], expected[0]["weight"])
    np.testing.assert_array_equal(moments["mu"], expected[1][1]["mu"])
    assert schedule.count == 6 and flag == skipped


def test_spikes_stand_out_of_noise_and_of_a_falling_curve():
    random = np.random.default_rng(0)
    curve = 8 * np.exp(-np.arange(400) / 150) + 2 + 0.05 * random.standard_normal(400)
    spikes = {50: 1.5, 51: 2.0, 300: 0.8, 390: 0.1}
    for step, height in spikes.items():
        curve[step] += height
    detector = SpikeDetector(8.0)
    found = [step for step, loss in enumerate(curve) if detector.is_spike(float(loss))]
    assert found == [50, 51, 300]
    for stop in (5, 50, 51, 290):
        before = SpikeDetector(8.0)
        kept = [step for step in range(stop) if before.is_spike(float(curve[step]))]
        resumed = SpikeDetector(8.0, json.loads(json.dumps(before.history())))
        after = [step for step in range(stop, 400) if resumed.is_spike(float(curve[step]))]
        assert kept + after == found
    off = SpikeDetector(0.0)
    assert not any(off.is_spike(float(loss)) for loss in curve)


def test_constant_losses_are_no_spikes():
    detector = SpikeDetector(8.0)
    assert not any(detector.is_spike(3.0) for _ in range(200))
    assert detector.is_spike(3.1)


def test_events_are_dropped_if_the_run_is_about_to_repeat_them(tmp_path):
    log = EventLog(tmp_path, 0)
    assert log.add("skipped", 4, 3, {"batch": 3}) == 1
    assert log.add("rollback", 9, 5, {}) == 1
    assert log.add("skipped", 7, 6, {}) == 2
    log.flush()
    path = tmp_path / "events.jsonl"
    path.write_text(path.read_text() + '{"event": "unfin')
    assert [event["step"] for event in read_events(tmp_path)] == [4, 9, 7]
    # Step 5's checkpoint: the rollback to it and what came after will happen again.
    resumed = EventLog(tmp_path, 5)
    assert (resumed.count("skipped"), resumed.count("rollback")) == (1, 0)
    assert [event["step"] for event in read_events(tmp_path)] == [4]
