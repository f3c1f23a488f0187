import subprocess

import pytest

from fp4jax import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """One commit of one file."""
    monkeypatch.delenv("FP4JAX_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_checkouts_commit_and_what_was_changed_since(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout
    clean = provenance.commit()
    assert len(clean) >= 7 and head.startswith(clean)
    (checkout / "notes.txt").write_text("not followed")
    assert provenance.commit() == clean
    (checkout / "code.py").write_text("x = 2\n")
    assert provenance.commit() == f"{clean}-dirty"


def test_an_installed_package_has_none_not_that_of_the_checkout_around_it(checkout, monkeypatch):
    installed = checkout / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(provenance, "ROOT", installed)
    assert provenance.commit() is None
    monkeypatch.setenv("FP4JAX_COMMIT", "abc1234")
    assert provenance.commit() == "abc1234"


def test_a_checkout_that_git_does_not_read_has_none(tmp_path, monkeypatch):
    monkeypatch.delenv("FP4JAX_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / ".git").write_text("gitdir: /nowhere\n")
    assert provenance.commit() is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config=configs/a.py", "--out=/home/me/plan.json"], "--config=configs/a.py --out=plan.json"),
        (["--out", "../secret/plan.json", "--debug"], "--out plan.json --debug"),
        (["-out=results/plan/plan.json"], "-out=plan.json"),
        (["--config=/home/me/own.py", "--config.data.path=/mnt/x/corpus"], "--config=own.py --config.data.path=corpus"),
        ([f"--config={provenance.ROOT}/configs/a.py"], "--config=configs/a.py"),
        (['--config.policy=[["a b", "nvfp4"]]'], """'--config.policy=[["a b", "nvfp4"]]'"""),
        (["--config.data.path=/mnt/a.bin,/mnt/b.bin"], "--config.data.path=a.bin,b.bin"),
        (["--config.data.paths=['/home/me/a.bin']"], """'--config.data.paths=['"'"'a.bin'"'"']'"""),
        (["--config.model_dir=file:///home/me/x"], "--config.model_dir=x"),
        (["--target=h200:1,b200:8"], "--target=h200:1,b200:8"),
    ],
)
def test_a_command_can_be_repeated_and_names_no_folder_of_the_machine(arguments, told):
    assert provenance.command("fp4jax.plan", arguments) == f"python -m fp4jax.plan {told}"
    assert set(provenance.about("fp4jax.plan", arguments)) == {"commit", "command"}
