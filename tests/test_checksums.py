import json

import pytest

from fp4jax.checksums import FORMAT_VERSION, MANIFEST, FormatVersionError, find_damage, write_manifest


@pytest.fixture
def item(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "array").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_whole_folder_is_not_damaged_and_later_files_do_not_matter(item):
    (item / "commit_success.txt").write_text("later")
    assert find_damage(item) is None
    assert set(json.loads((item / MANIFEST).read_text())["files"]) == {"d/array", "empty"}


@pytest.mark.parametrize("position", [0, 1_234_567, 256 * 9000 - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_found_anywhere(item, position, bit):
    data = bytearray((item / "d" / "array").read_bytes())
    data[position] ^= 1 << bit
    (item / "d" / "array").write_bytes(data)
    assert find_damage(item) == f"{item.name}/d/array has another checksum than when it was written"


def test_what_is_cut_or_gone_or_unreadable_is_named(item):
    (item / "d" / "array").write_bytes(b"0" * 10)
    assert find_damage(item) == f"{item.name}/d/array has 10 bytes of 2,304,000"
    (item / "d" / "array").unlink()
    assert find_damage(item) == f"{item.name}/d/array is missing"
    for broken in ("{", "[]", '{"d/array": 3}', '{"d/array": ["a", "b"]}', "\0"):
        (item / MANIFEST).write_text(broken)
        assert find_damage(item) == f"{item.name}/{MANIFEST} cannot be read", broken
    (item / MANIFEST).unlink()
    assert find_damage(item) == f"{item.name}/{MANIFEST} is missing"


def test_a_manifest_of_another_version_is_refused_and_one_without_a_version_is_read(item):
    manifest = json.loads((item / MANIFEST).read_text())
    (item / MANIFEST).write_text(json.dumps(manifest["files"]))
    assert find_damage(item) is None
    (item / MANIFEST).write_text(json.dumps(manifest | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(FormatVersionError, match=f"has format version {FORMAT_VERSION + 1}; this version"):
        find_damage(item)
