"""The errors that a user can mend. Nothing of this package is imported here."""

from __future__ import annotations


class KdError(Exception):
    """A mistake in the input or on the machine, shown to the user without a traceback.

    The message names the thing, its value and what is allowed; `hint` says what to do.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments do not survive the default pickling
        return _rebuild, (type(self), self.message, self.hint)


class ConfigError(KdError):
    """A configuration that no run can be made of."""


class DataError(KdError):
    """Data that is missing, damaged or of the wrong shape."""


class CheckpointError(KdError):
    """Weights that cannot be read, or belong to another model."""


class ExportError(KdError):
    """A model that cannot be exported, or whose exported form predicts something else."""


class StorageError(KdError):
    """A folder that cannot be written, a disk that is full."""


class Diverged(KdError):
    """A loss that is no longer a finite number."""


def _rebuild(kind: type[KdError], message: str, hint: str | None) -> KdError:
    return kind(message, hint=hint)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error as Python writes it where the message is empty."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
