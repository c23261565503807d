"""The three models of a run. Nothing of this package is imported here."""

from __future__ import annotations

ROLES = ("teacher", "student_alone", "student")  # in the order in which they are trained
ROLE_NAMES = {"teacher": "teacher", "student_alone": "student alone", "student": "student"}
