"""What `eval.py --tasks` does: the place of the record, the run, the table."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fp4jax.checkpoint import saved_config
from fp4jax.evaluation.subject import DEFAULT_BATCH_SIZE, open_subject
from fp4jax.evaluation.task_data import TASKS, check_tasks
from fp4jax.evaluation.tasks import render, run_tasks

DEFAULT_FOLDER = Path("runs/evaluation")


def evaluate_tasks(
    names: Sequence[str],
    *,
    workdir: str | None = None,
    model: str | None = None,
    recipe: str | None = None,
    policy: str | None = None,
    limit: int | None = None,
    task_data: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    out: str | None = None,
) -> None:
    """Scores tasks, prints the paper's table 1 with ours beside it, writes JSON; what it holds is not scored again.

    Args:
      names: of tasks, or "all".
      workdir, model, recipe, policy, batch_size, max_length: as in `open_subject`.
      limit, task_data: documents of each task, and the folder of their files, as in `run_tasks`.
      out: the record; by default `tasks-<recipe>.json` in the workdir, `runs/evaluation/<model>-<recipe>.json` for a
        pretrained model, with `-limit<N>` where there is one.

    Raises:
      ValueError, OSError: as `open_subject` and `run_tasks`.
    """
    names = list(TASKS) if list(names) == ["all"] else list(names)
    check_tasks(names)
    if (workdir is None) == (model is None):
        raise ValueError("give one of --workdir (a run of train.py) and --model (smollm2-135m, or a model's file)")
    asked = dict(model=model, recipe=recipe, policy=policy, max_length=max_length)
    asked |= {"batch_size": DEFAULT_BATCH_SIZE if batch_size is None else batch_size}
    checkpoint = None if workdir is None else saved_config(Path(workdir).expanduser().absolute())
    record = run_tasks(
        lambda: open_subject(workdir=workdir, **asked),
        names,
        Path(out) if out else _default_path(workdir, model, recipe, limit),
        settings=asked | {"workdir": workdir and Path(workdir).name, "step": checkpoint and checkpoint[0]},
        folder=None if task_data is None else Path(task_data),
        limit=limit,
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    print("\n" + render(record))


def _default_path(workdir: str | None, model: str | None, recipe: str | None, limit: int | None) -> Path:
    suffix = "" if limit is None else f"-limit{limit}"
    if workdir is not None:
        return Path(workdir).expanduser() / f"tasks-{recipe or 'as_trained'}{suffix}.json"
    return DEFAULT_FOLDER / f"{Path(model).stem}-{recipe or 'bf16'}{suffix}.json"
