import pytest

from fp4jax.plan.groups import groups, leave_machines

PAIRS = [[0, 1], [2, 3]]
STRIDED = [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, dimensions={0}", PAIRS),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}, dimensions={0}", STRIDED),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data','fsdp'}", [[0, 1, 2, 3]]),
        ("channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}", PAIRS),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", PAIRS),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", STRIDED),
        ("channel_id=1, source_target_pairs={{0,1},{2,3}}", PAIRS),
    ],
)
def test_every_notation(attributes, expected):
    assert groups(attributes, 4) == expected


def test_an_unknown_notation_is_refused():
    for text in ("dimensions={0}", "replica_groups=mesh['data'=4] {'data':(1)2}"):
        with pytest.raises(ValueError, match="unknown notation"):
            groups(text, 4)


def test_which_groups_leave_their_machine():
    assert not leave_machines("replica_groups={{0,1},{2,3}}", 4, on_a_machine=2)
    assert leave_machines("replica_groups={{0,2},{1,3}}", 4, on_a_machine=2)
    assert not leave_machines("replica_groups={}", 8, on_a_machine=8)
