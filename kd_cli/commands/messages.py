"""Messages for mistakes on the command line: what is wrong, and the argument that was probably meant."""

from __future__ import annotations

import errno
import os
import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_cli.commands.arguments import conf_dirs, split_arguments
from kd_cli.config.options import groups, key_names, no_such_option
from kd_cli.errors import ConfigError, KdError, first_line
from kd_cli.nearest import did_you_mean
from kd_cli.shipped import USER, raised_by

# Keys that have no near neighbour among ours, and what does the same here.
ELSEWHERE = {
    "model": "teacher= and student= choose a model",
    "temperature": "T= is the temperature",
    "data": "dataset= chooses the data",
}


def explain(error: BaseException, argv: Sequence[str]) -> str | None:
    """Return the message for an error, or None when the error is a bug and its traceback is wanted."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, KdError):
        return str(error)
    if (plugin := broken_plugin(error)) is not None:
        return str(plugin)
    if raised_by(error) == USER:
        return None
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_hydra(error, argv)
    if isinstance(error, OSError):
        return explain_storage(error)
    if _raised_in(error, ("hydra", "omegaconf")):
        # Hydra's checks of an override raise errors of any type.
        if (unquoted := needs_quotes(split_arguments(argv)[1])) is not None:
            return str(unquoted)
        return str(error) or f"Hydra does not accept these arguments ({type(error).__name__})"
    return None


def explain_storage(error: OSError) -> str | None:
    """Return the message for a file that cannot be read or written; None for errors of other kinds."""
    from kd_cli.errors import StorageError
    from kd_cli.storage.files import storage

    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # these come without the file's name
    if error.errno is None or (error.filename is None and error.errno not in full):
        return None
    try:
        with storage(Path(os.fsdecode(error.filename or "the run's files"))):
            raise error
    except StorageError as explained:
        return str(explained)


def explain_hydra(error: BaseException, argv: Sequence[str]) -> str:
    """Return Hydra's message, with the nearest key or option for a mistyped one."""
    text = str(error)
    folders = conf_dirs(argv)
    overrides = split_arguments(argv)[1]
    if (unquoted := needs_quotes(overrides)) is not None:
        return str(unquoted)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", text):
        return str(several_values(match[1]))
    if match := re.search(r"Error merging override (.*)", text):
        return f"{match[1]}: {_type_error(error) or error.__cause__ or text}"
    if match := re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' (?:not in|is not in struct)", text
    ):
        return str(no_such_key(match[1], folders, overrides, _in_job(error)))
    if match := re.search(r"(?:Could not find|In '.*': Could not (?:find|load)) '([^']+)'", text):
        return str(_missing_option(match[1], text, folders, overrides))
    return text


def no_such_key(key: str, folders: Sequence[Path], overrides: Sequence[str], job: str = "") -> ConfigError:
    """Return the error for a key that the configuration does not have, with the nearest key or option that it has."""
    value = next((o.partition("=")[2] for o in overrides if o.lstrip("+").partition("=")[0] == key), "")
    names = key_names(folders, overrides)
    hint = ELSEWHERE.get(key)
    if key in ("model", "loss") or (hint is None and key in groups(folders)):
        hint = hint or f"{key} is a group that is not chosen by default: +{key}={value or 'NAME'}"
    hint = hint or did_you_mean(key, [name for name in names if name != key])
    return ConfigError(f"there is no key {key!r}{job}", hint=hint or "kd-run --help lists every key")


def _missing_option(name: str, text: str, folders: Sequence[Path], overrides: Sequence[str]) -> ConfigError:
    """Return the error for an option that Hydra could not find; `name` is the path of the file that it looked for."""
    available = groups(folders)
    for override in overrides:  # an option with slashes, a folder for example, is not to be split at the last one
        group, _, option = override.lstrip("+").partition("=")
        if group in available and f"{group}/{option}".replace("//", "/") == name.replace("//", "/"):
            return no_such_option(group, option, available[group])
    group, _, option = name.rpartition("/")
    names = {*re.findall(r"^\t(\S+)$", text, re.M), *available.get(group, {})}
    return no_such_option(group, option, names)


# ---------------------------------------------------------------- values that Hydra reads otherwise than they are meant


def needs_quotes(overrides: Sequence[str]) -> ConfigError | None:
    """Return the error for the first override that Hydra cannot parse, with the quoted form that it can; else None."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        key, equals, value = override.partition("=")
        shown = override.replace("\n", "\\n")  # the message stays in one line
        reason = ""
        try:
            parser.parse_override(override)
            if key:
                continue
        except HydraException as error:
            reason = first_line(error)
        if not equals or not key:
            return ConfigError(
                f"{override!r} is no override; it must be key=value or group=option", hint="kd-run --help lists both"
            )
        for quoted in quoted_forms(value):
            with_quotes = f"{key}={quoted}"
            try:
                if parser.parse_override(with_quotes).value() == value:
                    hint = f"quote the value twice, for the shell and for Hydra: {shlex.quote(with_quotes)}"
                    return ConfigError(f"{shown} cannot be read: {reason}", hint=hint)
            except HydraException:
                continue
        return ConfigError(f"{shown} cannot be read: {reason}")
    return None


def quoted_forms(value: str) -> Iterator[str]:
    """Yield a value in the quotes that Hydra understands: a quote of the same kind inside has a backslash before it."""
    for quote in ('"', "'"):
        # Before a quote, and at the end, a backslash is an escape character; elsewhere it stands for itself.
        inside = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", value)
        inside = re.sub(r"(\\+)$", r"\1\1", inside)
        yield quote + inside + quote


def several_values(override: str) -> ConfigError:
    """Return the error for values of a sweep in a single run."""
    key, _, value = override.partition("=")
    hint = f"kd-run -m {shlex.quote(override)} runs each of them"
    if "(" not in value:
        forms = (shlex.quote(f"{key}=[{value}]"), shlex.quote(f'{key}="{value}"'))
        hint += f"; {forms[0]} is a list; {forms[1]} is a text with a comma"
    return ConfigError(f"{override} gives several values, which a single run cannot have", hint=hint)


# ---------------------------------------------------------------- plug-ins


def broken_plugin(error: BaseException) -> KdError | None:
    """Return the error for a Hydra plug-in of the environment that cannot be imported; None for all other errors."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if "hydra.core.plugins" not in modules:
        return None
    found = [name for name in modules if name.startswith("hydra_plugins.")]
    if not found or found[0].startswith("hydra_plugins.kd_cli"):
        return None
    package = found[0].split(".")[1]
    return KdError(
        f"the Hydra plug-in {package} cannot be imported: {type(error).__name__}: {first_line(error)}",
        hint=f"pip uninstall {package.replace('_', '-')}, or install a version for this Python and this Hydra",
    )


# ---------------------------------------------------------------- where an error is from


def _in_job(error: BaseException) -> str:
    """Return the overrides of the sweep's job that an error is from, as part of a sentence; empty where unknown."""
    notes = getattr(error, "__notes__", [])
    return f" ({notes[0]})" if notes else ""


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether the innermost frame of the traceback belongs to one of these packages."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in packages


def _type_error(error: BaseException) -> str | None:
    """Return OmegaConf's complaint about a value's type behind a failed override, else None."""
    from omegaconf.errors import ValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValidationError):
            return first_line(cause)
        cause = cause.__cause__
    return None
