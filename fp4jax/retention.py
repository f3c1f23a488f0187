"""Which checkpoints are kept: the latest, and those of every so many steps."""

from collections.abc import Sequence

from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy


def retention(latest: int, every: int) -> LatestN | AnyPreservationPolicy:
    """Keeps the `latest` checkpoints, and those whose step is a multiple of `every` (0: no others)."""
    return AnyPreservationPolicy([LatestN(latest), _MultiplesOf(every)]) if every else LatestN(latest)


class _MultiplesOf(PreservationPolicy):
    """Orbax's EveryNSteps counts from the oldest checkpoint that is left, which a rollback or damage may move."""

    def __init__(self, steps: int):
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        return [checkpoint.step % self._steps == 0 for checkpoint in checkpoints]
