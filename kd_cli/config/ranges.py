"""Checks of a single value: a number within bounds, an interval, a normalisation."""

from __future__ import annotations

import math
import re
from typing import Any

from kd_cli.config.schema import Allowed
from kd_cli.errors import ConfigError
from kd_cli.numeric import is_number, is_whole

COLUMNS = re.compile(r"\d*:\d*")  # features of a table: "0:50", "50:"


def check_number(name: str, value: Any, allowed: Allowed) -> float | int:
    """Return a number within its bounds. ConfigError names the key, its value, and the bounds."""
    hint = f"for example {name}={allowed.example}" if allowed.example else None
    if not (is_whole(value) if allowed.whole else is_number(value)):
        raise ConfigError(f"{name} is {value!r}; it must be {allowed_numbers(allowed)}", hint=hint)
    if allowed.above is not None and value <= allowed.above:
        bound = f"above {shown(allowed.above)}" if allowed.least is not None else bounds(allowed)
        raise ConfigError(f"{name} is {value}; it must be {bound}", hint=hint)
    too_small = allowed.least is not None and value < allowed.least
    too_large = (allowed.most is not None and value > allowed.most) or (
        allowed.below is not None and value >= allowed.below
    )
    if too_small or too_large:
        words = allowed_numbers(allowed) if allowed.what else bounds(allowed)
        why = allowed.hint_least if too_small else allowed.hint_most
        raise ConfigError(f"{name} is {value}; it must be {words}", hint=why or hint)
    return value if allowed.whole else float(value)


def allowed_numbers(allowed: Allowed) -> str:
    """Return the allowed numbers in words: "a number above 0", "an angle in degrees, from 0 to 180"."""
    kind = allowed.what or ("a whole number" if allowed.whole else "a number")
    if allowed.above is not None and allowed.least is not None:
        return f"{kind} above {shown(allowed.above)}"
    joint = " " if allowed.above is not None else ", "
    return kind + joint + bounds(allowed)


def bounds(allowed: Allowed) -> str:
    """Return the bounds of a number in words."""
    if allowed.what and allowed.most is not None:
        return f"from {shown(allowed.least)} to {shown(allowed.most)}"
    if allowed.least == 0 and allowed.most is allowed.below is None:
        return "0 or more"
    lower = f"at least {shown(allowed.least)}" if allowed.least is not None else f"above {shown(allowed.above)}"
    if allowed.most is allowed.below is None:
        return lower
    upper = f"at most {shown(allowed.most)}" if allowed.most is not None else f"below {shown(allowed.below)}"
    return f"{lower} and {upper}"


def shown(bound: float | None) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def interval(name: str, value: Any) -> tuple[int, float]:
    """Return `checkpoint.every` as epochs and seconds, one of them 0: 5 is every 5 epochs, `30s` every 30 seconds."""
    text = str(value)
    try:
        if text.endswith("s"):
            seconds = float(text[:-1])
            if 0 <= seconds < math.inf:
                return 0, seconds
        elif not isinstance(value, bool) and int(text) >= 1:
            return int(text), 0.0
    except ValueError:
        pass
    raise ConfigError(
        f"{name} is {value!r}; it must be a number of epochs or of seconds", hint=f"{name}=5 or {name}=30s"
    )


def normalisation(name: str, value: Any) -> Any:
    """Return how a model wants its input: a word, or a mean and a standard deviation of values from 0 to 1."""
    if value in ("data", "imagenet", "none"):
        return value
    if value is None:
        return "none"
    if not isinstance(value, dict) or set(value) != {"mean", "std"}:
        raise ConfigError(
            f"{name} is {value!r}; it must be data, imagenet, none, or a mean and a standard deviation",
            hint=f"of values from 0 to 1; for example '{name}={{mean: 0.5, std: 0.5}}'",
        )
    for part, item in value.items():
        for number in item if isinstance(item, list) else [item]:
            if not is_number(number):
                raise ConfigError(f"{name}.{part} is {number!r}; it must be a number, or a list with one per channel")
            if part == "std" and number <= 0:
                raise ConfigError(f"{name}.{part} is {number}; it must be above 0")
    return value


def _distinct_numbers(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0 up, each once, and not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(is_whole(c) and c >= 0 for c in value)
        and len(set(value)) == len(value)
    )


def input_view(name: str, value: Any) -> dict[str, Any] | None:
    """Return what a model sees of an example, or None for all of it.

    A size and channels of images, columns of a table or context of frames, and a normalisation.
    """
    if value is None:
        return None
    keys = ("size", "channels", "columns", "context", "normalize")
    if not isinstance(value, dict) or not value or not set(value) <= set(keys):
        raise ConfigError(
            f"{name} is {value!r}; it must be null, or have some of the keys {', '.join(keys)}",
            hint=f"'{name}={{size: 7}}' for smaller images, '{name}={{columns: [0, 1]}}' for some features of a table",
        )
    size, columns = value.get("size"), value.get("columns")
    if size is not None and (not is_whole(size) or size < 1):
        raise ConfigError(f"{name}.size is {size!r}; it must be a whole number of pixels, 1 or more")
    if columns is not None and not (isinstance(columns, str) and COLUMNS.fullmatch(columns)):
        if not isinstance(columns, list) or not columns or not all(is_whole(c) and c >= 0 for c in columns):
            raise ConfigError(
                f"{name}.columns is {columns!r}; it must be a list of features, counted from 0, or a part of them",
                hint=f"'{name}={{columns: [0, 3]}}', or from one up to before another: '{name}={{columns: \"0:50\"}}'",
            )
        if len(set(columns)) < len(columns):
            raise ConfigError(f"{name}.columns names a feature twice: {columns}")
    channels, context = value.get("channels"), value.get("context")
    if channels not in (None, "grey") and not _distinct_numbers(channels):
        raise ConfigError(
            f"{name}.channels is {channels!r}; it must be a list of channels, each once and counted from 0, or grey",
            hint=f"'{name}={{channels: [0]}}' for the first one, '{name}={{channels: grey}}' for the mean of all",
        )
    if context is not None and (not is_whole(context) or context < 0):
        raise ConfigError(f"{name}.context is {context!r}; it must be a whole number of frames, 0 or more")
    of_images = size is not None or channels is not None
    if of_images + (columns is not None) + (context is not None) > 1:
        raise ConfigError(
            f"{name} has more than one of a view of images, columns of a table and context of frames",
            hint="give one of them",
        )
    if "normalize" in value:
        normalisation(f"{name}.normalize", value["normalize"])
    return value
