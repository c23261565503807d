"""The three models of a run. Nothing of this package is imported here."""

from __future__ import annotations

ROLES = ("teacher", "student_alone", "student")  # in the order in which they are trained
TRAINED = ("teacher", "assistant", "student_alone", "student")  # the roles of metrics.jsonl, in the same order
ROLE_NAMES = {"teacher": "teacher", "student_alone": "student alone", "student": "student"}
