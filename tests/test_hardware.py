"""Which device a program is traced for; meshes of devices that are not here: tests/test_native.py."""

import types

import jax
import pytest

from fp4jax import hardware

CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")


@pytest.fixture
def machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda platform=None: [CPU] if platform == "cpu" else [GPU])


def test_the_first_device_and_its_capability(machine_with_a_gpu):
    assert hardware.current() == hardware.Hardware("gpu", "NVIDIA H200", "9.0", 1)
    assert hardware.current().is_gpu and hardware.current().capability == (9, 0)


def test_jax_default_device_comes_first(machine_with_a_gpu):
    with jax.default_device("cpu"):
        assert hardware.current() == hardware.Hardware("cpu", "cpu", "", 1)


@pytest.mark.parametrize(
    ("enabled", "tunables", "found"),
    [
        ("always [madvise] never", "", False),
        ("always [madvise] never", "glibc.malloc.arena_max=2", False),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", False),
        ("always [madvise] never", f"glibc.malloc.arena_max=2:{hardware.HUGE_PAGES}", True),
        ("always [madvise] never", "glibc.malloc.hugetlb=2", True),
        ("[always] madvise never", "", True),
        ("always madvise [never]", hardware.HUGE_PAGES, None),
        ("?", hardware.HUGE_PAGES, None),
    ],
)
def test_huge_pages(enabled, tunables, found, tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text(enabled)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert hardware.huge_pages(str(tmp_path)) is found
    assert hardware.huge_pages(str(tmp_path / "nowhere")) is None
