"""Which matrix products of a function run in FP4, from its jaxpr and its compiled program: `fp4jax.report`."""

from fp4jax.reporting.compiled import CompiledCheck
from fp4jax.reporting.report import Report, of_program, report
from fp4jax.reporting.rows import Precision, Row

__all__ = ["CompiledCheck", "Precision", "Report", "Row", "of_program", "report"]
