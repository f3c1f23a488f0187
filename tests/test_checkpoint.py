import contextlib
import json
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fp4jax import distributed
from fp4jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    StorageError,
    check_same_run,
    check_space,
    prepare_workdir,
    saved_config,
    set_aside_damaged,
)
from fp4jax.config import default_config
from fp4jax.config_checks import config_differences


def sharding(*axes):
    mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return NamedSharding(mesh, PartitionSpec(*axes))


def state(value, size=64):
    params = {"layers.weight": jax.device_put(jnp.full((size, 8), value, jnp.float32), sharding("fsdp"))}
    rest = {"step": jax.device_put(jnp.int32(value), sharding()), "opt_state": ((), {"mu": jnp.full((3,), value)})}
    return params, rest


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def save(workdir, *steps, config=None, **options):
    with Checkpointer(workdir, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, *state(step), {"next_batch": step}, config or default_config())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_into_shards(tmp_path, asynchronous):
    save(tmp_path, 3, asynchronous=asynchronous)
    params, rest = state(3)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        found_params, found_rest, position = checkpointer.restore(shapes(params), shapes(rest))
        only = checkpointer.restore_params(shapes(params))
    jax.tree.map(np.testing.assert_array_equal, (found_params, found_rest, only), (params, rest, params))
    assert position == {"next_batch": 3}
    assert found_params["layers.weight"].sharding == only["layers.weight"].sharding == sharding("fsdp")


def test_save_is_not_disturbed_by_donation(tmp_path):
    """The next step overwrites the donated state while the files are still being written."""
    params, rest = state(1, size=100_000)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path, asynchronous=True) as checkpointer:
        checkpointer.save(1, params, rest, {}, default_config())
        target = shapes(params)
        jax.block_until_ready(update(params))
        checkpointer.wait()
        np.testing.assert_array_equal(checkpointer.restore_params(target)["layers.weight"], 1.0)


def test_latest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_saving_a_step_twice_leaves_it(tmp_path):
    save(tmp_path, 1, 1)
    save(tmp_path, 1)
    assert saved_config(tmp_path)[0] == 1


def test_no_checkpoint(tmp_path):
    assert saved_config(tmp_path) is None
    assert check_same_run(tmp_path, default_config()) == 0
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match="holds no checkpoint; train with this --workdir first"),
    ):
        checkpointer.saved_config()
    assert check_same_run(tmp_path, default_config()) == 0


def test_config_of_another_run_is_refused_with_every_difference(tmp_path):
    save(tmp_path, 7)
    config = default_config()
    config.steps, config.log.every, config.checkpoint.every, config.mesh.data = 5000, 1, 3, -1
    assert check_same_run(tmp_path, config) == 7
    config.seed, config.model.num_layers, config.recipe = 1, 9, "bf16"
    with pytest.raises(CheckpointError) as caught:
        check_same_run(tmp_path, config)
    message = str(caught.value)
    assert "step 7 of a run with another config" in message and "\n" not in message
    assert "(model.num_layers 4 → 9; recipe 'averis' → 'bf16'; seed 0 → 1)" in message


@pytest.mark.parametrize(
    ("key", "changes_the_run"),
    [
        *(("policy", True), ("schedule", True)),
        *(("recipe", True), ("seed", True), ("batch_size", True), ("microbatches", True), ("seq_len", True)),
        *(
            ("model.rope_theta", True),
            ("optimizer.b2", True),
            ("data.source", True),
            ("data.validation_fraction", True),
        ),
        *(("steps", False), ("backend", False), ("log.every", False), ("evaluation.batches", False)),
        *(("on_nonfinite", False), ("watchdog.timeout", False), ("divergence.spike", False)),
        *(("checkpoint.keep", False), ("mesh.fsdp", False), ("data.prefetch", False), ("model.remat", False)),
    ],
)
def test_what_may_change(key, changes_the_run):
    saved, config = default_config(), default_config()
    group = config
    *groups, name = key.split(".")
    for part in groups:
        group = group[part]
    group[name] = group[name] + ("x" if isinstance(group[name], str) else 1)
    assert bool(config_differences(saved.to_dict(), config)) == changes_the_run


def test_key_that_the_checkpoint_does_not_know_had_its_default():
    saved = json.loads(json.dumps(default_config().to_dict()))
    del saved["optimizer"]["eps"]
    assert config_differences(saved, default_config()) == []
    config = default_config()
    config.optimizer.eps = 1e-6
    assert config_differences(saved, config) == ["optimizer.eps 1e-08 → 1e-06"]


def test_the_number_of_shards_is_part_of_the_recipe():
    """On another mesh a run goes on with its own; statistics of others would be another recipe."""
    saved = default_config()
    saved.recipe = "averis+shards8"
    config = default_config()
    config.recipe, config.mesh.data = "averis+shards4", 4
    assert config_differences(saved.to_dict(), config) == ["recipe 'averis+shards8' → 'averis+shards4'"]


def test_long_values_are_cut_in_the_message():
    config = default_config()
    config.policy = str([["." * 200, "run"]])
    (line,) = config_differences(default_config().to_dict(), config)
    assert line.startswith("policy 'all_linear' → \"[['....") and line.endswith("...") and len(line) < 150


@contextlib.contextmanager
def full_disk():
    """Files cannot grow beyond 100 kB: what a full disk does to a write."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_leaves_the_former_checkpoint(tmp_path, asynchronous):
    save(tmp_path, 1)
    random = {"layers.weight": jax.random.normal(jax.random.key(0), (1_000_000,))}
    with (
        pytest.raises(StorageError) as caught,
        full_disk(),
        Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer,
    ):
        checkpointer.save(2, random, state(2)[1], {}, default_config())
    message = str(caught.value)
    assert "could not be written" in message and "File too large" in message and "\n" not in message
    assert "the checkpoint of step 1 is intact; free space and rerun the same command" in message
    assert saved_config(tmp_path)[0] == 1
    params, rest = state(1)
    with Checkpointer(tmp_path) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore_params(shapes(params))["layers.weight"], 1.0)
        checkpointer.save(2, params, rest, {}, default_config())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"][-1:]


@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_failed_is_forgotten_by_the_ones_after_it(tmp_path, asynchronous):
    random = {"layers.weight": jax.random.normal(jax.random.key(0), (1_000_000,))}
    (params, rest), config = state(1), default_config()
    with Checkpointer(tmp_path, keep=1, asynchronous=asynchronous) as checkpointer:
        checkpointer.save(1, params, rest, {}, config)
        checkpointer.wait()
        with full_disk(), pytest.raises(StorageError, match="the checkpoint of step 1 is intact"):
            checkpointer.save(2, random, rest, {}, config)
            checkpointer.wait()
        checkpointer.delete_after(1)
        assert checkpointer.steps() == [1]
        checkpointer.save(3, params, rest, {}, config)
        checkpointer.wait()
        assert checkpointer.steps() == [3]
        checkpointer.delete_after(1)
        assert checkpointer.steps() == []


# Orbax gives up at the first write that fails; TensorStore's others end after the event loop they were to tell.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
def test_looking_for_the_error_of_a_save_does_not_hide_it(tmp_path):
    save(tmp_path, 1)
    random = {"layers.weight": jax.random.normal(jax.random.key(0), (1_000_000,))}
    with Checkpointer(tmp_path, asynchronous=True) as checkpointer, full_disk():
        checkpointer.save(2, random, state(2)[1], {}, default_config())
        deadline = time.monotonic() + 60
        with pytest.raises(StorageError, match="the checkpoint of step 1 is intact"):
            while time.monotonic() < deadline:
                checkpointer.check()
    assert saved_config(tmp_path)[0] == 1


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def test_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys):
    save(tmp_path, 1, 2, keep=2)
    flip(largest_file(tmp_path / "checkpoints" / "2" / "optimizer"))
    assert check_same_run(tmp_path, default_config()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoints/2 is damaged (optimizer/" in line and line.endswith("is passed over")
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        params = checkpointer.restore_params(shapes(state(1)[0]))
    np.testing.assert_array_equal(params["layers.weight"], 1.0)

    set_aside_damaged(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert [path.name for path in (tmp_path / "damaged_checkpoints").iterdir()] == ["2"]
    save(tmp_path, 2, keep=2)
    assert saved_config(tmp_path)[0] == 2


def test_a_damaged_checkpoint_that_is_asked_for_by_its_step_is_refused(tmp_path):
    save(tmp_path, 1, 2, keep=2)
    flip(largest_file(tmp_path / "checkpoints" / "1" / "optimizer"))
    params, rest = (shapes(part) for part in state(1)[:2])
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        with pytest.raises(
            CheckpointError, match=r"checkpoints/1 is damaged \(optimizer/.*; delete that folder to go on"
        ):
            checkpointer.restore(params, rest, step=1)
        with pytest.raises(CheckpointError, match="checkpoints/3 cannot be read"):
            checkpointer.restore(params, rest, step=3)
        np.testing.assert_array_equal(checkpointer.restore(params, rest, step=2)[0]["layers.weight"], 2.0)


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    save(tmp_path, 1)
    flip(largest_file(tmp_path / "checkpoints" / "1" / "params"))
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged; choose another --workdir") as caught:
        check_same_run(tmp_path, default_config())
    assert "\n" not in str(caught.value)


def test_no_flipped_byte_in_any_file_is_restored(tmp_path):
    """Of everything that Orbax reads of an item; its own record of the whole checkpoint decides nothing."""
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        if not data or path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            continue
        flip(path, len(data) // 2)
        with pytest.raises(CheckpointError, match="damaged"):
            saved_config(tmp_path)
        path.write_bytes(data)
    assert saved_config(tmp_path)[0] == 1


def test_checkpoint_of_an_earlier_version_is_taken_with_a_warning(tmp_path, capsys):
    save(tmp_path, 1)
    for manifest in tmp_path.rglob("checksums.json"):
        manifest.unlink()
    assert saved_config(tmp_path)[0] == 1
    assert "has no checksums" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"), [("garbage", "cannot be read ("), ("null", "is no JSON object"), ("[]", "is no JSON object")]
)
def test_a_configuration_that_is_none_is_refused_where_no_checksum_finds_it(content, said, tmp_path):
    save(tmp_path, 1)
    for manifest in tmp_path.rglob("checksums.json"):
        manifest.unlink()
    (tmp_path / "checkpoints" / "1" / "config" / "metadata").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(tmp_path, default_config())
    message = str(caught.value)
    assert said in message and "; delete that folder to go on" in message and "\n" not in message


def test_every_so_many_steps_are_kept_beside_the_latest(tmp_path):
    save(tmp_path, *range(1, 10), keep=2, keep_every=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8", "9"]


def test_another_config_may_go_on_when_allowed(tmp_path, capsys):
    save(tmp_path, 7)
    config = default_config()
    config.optimizer.weight_decay = 0.5
    with pytest.raises(CheckpointError, match="--allow_config_change"):
        check_same_run(tmp_path, config)
    assert check_same_run(tmp_path, config, allow_change=True) == 7
    assert "goes on after step 7 with another config (optimizer.weight_decay 0.1 → 0.5)" in capsys.readouterr().err


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/run cannot be written: Not a directory; choose another --workdir"):
        prepare_workdir(tmp_path / "file" / "run")
    assert prepare_workdir(tmp_path / "new" / "run").is_dir()
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_state_larger_than_the_disk(tmp_path):
    check_space(tmp_path, state(1))
    with pytest.raises(StorageError, match=r"takes 4503599.63 GB .* free space or choose another --workdir"):
        check_space(tmp_path, {"a": jax.ShapeDtypeStruct((2**50,), jnp.float32)})


def test_a_process_that_is_lost_while_reading_is_no_damage(tmp_path, monkeypatch):
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo: Connection closed by peer")
    params, rest = state(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, params, rest, {}, default_config())
        checkpointer.wait()

        def restore(*_, **__):
            raise lost

        monkeypatch.setattr(checkpointer._manager, "restore", restore)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpointer.restore(shapes(params), shapes(rest))
        monkeypatch.setattr(distributed, "several", lambda: True)
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpointer.restore(shapes(params), shapes(rest))
        with pytest.raises(distributed.ProcessesError, match="another process has ended"), (
            distributed.naming_lost_processes()
        ):  # fmt: skip
            checkpointer.restore(shapes(params), shapes(rest))
        monkeypatch.undo()
