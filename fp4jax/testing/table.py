"""The table of a conformance run: one row a law."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One law and what became of it.

    Attributes:
      law: its name, stable: tests and scripts may look for it.
      passed: True or False; None where the law does not apply to what was given.
      detail: what was checked, what was seen instead, or why the law does not apply.
    """

    law: str
    passed: bool | None
    detail: str

    @property
    def result(self) -> str:
        return {True: "pass", False: "FAIL", None: "not applicable"}[self.passed]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of `conformance`, in the order of the laws; `str()` aligns them, `table["law"]` finds one."""

    name: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """No law failed, and at least one was checked. A law that does not apply counts as neither."""
        return not self.failures and any(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.passed is False)

    def __getitem__(self, law: str) -> Row:
        for row in self.rows:
            if row.law == law:
                return row
        raise KeyError(f"no law {law!r}; there are {', '.join(repr(row.law) for row in self.rows)}")

    def __str__(self) -> str:
        law_width = max(len(row.law) for row in self.rows)
        lines = [f"{row.law:{law_width}}  {row.result:14}  {row.detail}" for row in self.rows]
        counts = [sum(row.passed is value for row in self.rows) for value in (True, False, None)]
        total = "{} passed, {} failed, {} not applicable".format(*counts)
        return "\n".join([f"{self.name}: {total}", *lines])
