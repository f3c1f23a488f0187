"""The conformance kit finds every fault it is there to find, and nothing in our quantizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax.numerics import key_words, quantize
from fp4jax.testing import Row, Table, conformance
from fp4jax.testing.kit import LAWS, check_law
from fp4jax.testing.subject import Subject
from pallas_kernels import compat
from pallas_kernels.quantize import quantize_rows
from tests import oracle
from tests.testing.broken import BROKEN, MAGNITUDES, emulate, stochastic_on

LAW = dict(LAWS)
CASES = [(law, fault) for law, faults in BROKEN.items() for fault in faults]
# Laws that a returned array cannot show.
NEED_CODES = {
    "golden vectors: codes",
    "golden vectors: scales and amax",
    "amax is the largest magnitude",
    "block scales",
    "values follow from codes",
}
STOCHASTIC = {law for law in LAW if "stochastic" in law}
PROGRAMS = {"jit = eager", "sharded = single device"}
SQUARE = "golden vector of 16x16 blocks"


def jitted(subject):
    return Subject(*(f and jax.jit(f) for f in (subject.nearest, subject.stochastic, subject.square)))


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("law", "fault"), CASES)
def test_the_law_finds_its_fault(law, fault):
    row = check_law(law, LAW[law], jitted(BROKEN[law][fault]))
    assert row.passed is False
    assert not row.detail.startswith("raised"), row.detail
    assert row.detail.isprintable() and len(row.detail) < 250  # one line of the table


def test_every_law_is_shown_to_fail():
    assert set(BROKEN) == set(LAW)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_what_the_faults_are_made_of_is_right():
    # Otherwise a fault might be found for another reason than the one it is named after.
    table = conformance(jax.jit(emulate()), jax.jit(emulate(stochastic_on(MAGNITUDES))))
    assert not table.failures, table


def test_xla_conforms_to_nearest():
    subject = Subject(jax.jit(quantize))
    rows = [check_law(law, LAW[law], subject) for law in LAW if law not in STOCHASTIC | PROGRAMS | {SQUARE}]
    assert all(row.passed for row in rows), rows


@pytest.mark.slow
def test_xla_conforms():
    stochastic = jax.jit(lambda x, key: quantize(x, rounding="stochastic", key=key))
    square = jax.jit(lambda x: quantize(x, block=(16, 16)))
    table = conformance(jax.jit(quantize), stochastic, square_fn=square)
    assert all(row.passed for row in table.rows), table


@pytest.mark.slow
@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(True, id="interpreter", marks=pytest.mark.skipif(not compat.CAN_INTERPRET, reason="JAX 0.12")),
        pytest.param(False, id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_pallas_conforms(interpret):
    table = conformance(
        jax.jit(lambda x: quantize_rows(x, interpret=interpret)),
        jax.jit(lambda x, key: quantize_rows(x, interpret=interpret, words=key_words(key))),
        draws=2048,  # an interpreter is slow, and the bits are those of the XLA twin
    )
    assert table.passed, table


def test_the_numpy_oracle_conforms_and_an_array_shows_no_codes():
    table = conformance(lambda x: oracle.quantize(np.asarray(x)).dequantize(), name="oracle")
    not_applicable = {row.law for row in table.rows if row.passed is None}
    assert not_applicable == {*NEED_CODES, *STOCHASTIC, SQUARE}
    assert {row.law for row in table.failures} == PROGRAMS  # it is not JAX
    assert "oracle: 12 passed, 2 failed, 10 not applicable" in str(table)
    assert "block scales                     not applicable  only values were returned" in str(table)


def raising(x):
    raise RuntimeError("no such kernel\nsecond line")


def test_a_quantizer_that_raises_fails_each_law_in_one_line():
    table = conformance(raising)
    assert table.name == "raising" and not table.passed
    assert table["zero"] == Row("zero", False, "raised RuntimeError: no such kernel")
    assert len(str(table).splitlines()) == len(LAWS) + 1


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x[:, :16], "values of shape"),
        (lambda x: x.astype(jnp.int32), "dequantized floating-point numbers are needed"),
    ],
)
def test_an_unfit_result_is_named(result, message):
    assert message in check_law("zero", LAW["zero"], Subject(result)).detail


def test_a_table_without_a_passed_law_has_not_passed():
    table = Table("nothing", (Row("zero", None, ""),))
    assert not table.passed
    with pytest.raises(KeyError, match="no law 'ones'; there are 'zero'"):
        table["ones"]


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("law", "message"),
    [
        ("scale equivariance", "all zeros from 2^-"),
        ("NaN is not hidden", "nan at (0, 0) (nearest) came out as"),
        ("all 15 values, stochastic", "never seen: -1.5, 1.5"),
        ("sharded = single device", "nearest, rows sharded: "),
    ],
)
def test_a_failure_says_what_was_seen(law, message):
    assert message in check_law(law, LAW[law], jitted(next(iter(BROKEN[law].values())))).detail
