"""Builds the objects that `_target_` nodes describe: our checks and messages, above `hydra.utils.instantiate`.

What Hydra's users know works: nested nodes, `_args_`, `_partial_`, `_recursive_` and `_convert_`. One default differs:
`_convert_` is "all", so a target receives plain lists and dictionaries.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

from kd_cli.config.moved import current_name, with_current_names
from kd_cli.errors import ConfigError, first_line
from kd_cli.nearest import did_you_mean
from kd_cli.shipped import USER, raised_by

ARGS, PARTIAL, RECURSIVE, CONVERT = "_args_", "_partial_", "_recursive_", "_convert_"
SPECIAL = ("_target_", ARGS, PARTIAL, RECURSIVE, CONVERT)
CONVERSIONS = ("none", "partial", "object", "all")


def locate(target: Any) -> Any:
    """Return the function or class that a `_target_` names, under its present name or a former one.

    Raises ConfigError when there is none. An error inside an imported module is its author's and keeps its traceback.
    """
    if not isinstance(target, str) or not target:
        raise ConfigError(f"_target_ is {target!r}; it must be the full name of a function or class")
    parts = current_name(target).split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue  # there is no such module: the rest of the path may be attributes
            raise
        try:
            return functools.reduce(getattr, parts[cut:], found)
        except AttributeError as error:
            close = did_you_mean(parts[-1], [name for name in dir(found) if not name.startswith("_")])
            raise ConfigError(f"_target_ is {target}, and {name} has no {parts[-1]}", hint=close) from error
    raise ConfigError(
        f"_target_ is {target}, and no module of that name can be imported",
        hint="own modules are found in the working directory and on PYTHONPATH",
    )


def build(node: Mapping[str, Any], /, *args: Any, where: str = "", **kwargs: Any) -> Any:
    """Call a node's `_target_` with the node's arguments and those given here.

    `where` is the node's key, for messages. A node with `_partial_: true` gives a functools.partial when no arguments
    are given here, else the call's result: they are what was missing. Raises ConfigError for an argument that the
    target does not have, with the nearest one, and for a value that a library refuses; an error of the user's own code
    is raised as it is.
    """
    where = where or str(node["_target_"])
    check_node(node, where, args, kwargs)
    try:
        factory = _instantiate(node)
        return factory if node.get(PARTIAL) and not args and not kwargs else factory(*args, **kwargs)
    except Exception as error:
        explained = _explained(error, node, where)
        if explained is None:
            raise
        raise explained from error


def _instantiate(node: Mapping[str, Any]) -> Any:
    """Return a partial of the node's target, with the arguments that the node holds built.

    The last call is left to us: Hydra would turn the arguments given to it into containers of its own. A node of plain
    values for a function of kd-cli or an optimiser needs nothing of Hydra, whose call takes a millisecond or more: a
    job of a sweep has a dozen such nodes.
    """
    if is_plain(node):
        own = {key: copy.deepcopy(value) for key, value in node.items() if key != "_target_"}
        return functools.partial(locate(node["_target_"]), **own)
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    plain = {CONVERT: "all", **with_current_names(dict(node)), PARTIAL: True}
    with warnings.catch_warnings():
        # Hydra 1.4 warns of every target outside a whitelist, but a whitelist switches its list of dangerous ones off.
        warnings.filterwarnings("ignore", r"hydra\.utils\.instantiate\(\) resolved")
        try:
            return instantiate(plain)
        except InstantiationException as error:
            if not isinstance(error.__cause__, Exception):
                raise
            nested = error.__cause__  # what a nested node's target raised; Hydra 1.4 does not wrap it
    raise nested


def is_plain(node: Mapping[str, Any]) -> bool:
    """Whether a node of kd-cli's functions or torch's optimisers holds no other node and no special key."""

    def holds_node(value: Any) -> bool:
        if isinstance(value, Mapping):
            return "_target_" in value or any(map(holds_node, value.values()))
        return isinstance(value, list | tuple) and any(map(holds_node, value))

    known = str(node["_target_"]).startswith(("kd_cli.", "torch.optim."))
    special = any(key in node for key in SPECIAL if key != "_target_")
    return known and not special and not any(map(holds_node, node.values()))


def _explained(error: Exception, node: Mapping[str, Any], where: str) -> ConfigError | None:
    """Return a ConfigError where a wrong value in the configuration caused the error, None where a bug did."""
    from hydra.errors import InstantiationException

    if isinstance(error, InstantiationException):  # Hydra's list of dangerous targets
        words = " ".join(str(error).split("\nfull_key")[0].split())
        return ConfigError(f"{where}: {words}")
    owner = raised_by(error)
    refused = TypeError | ValueError | OverflowError | MemoryError
    if owner == __name__:  # a library, called from here
        refused |= RuntimeError
    too_large = isinstance(error, RuntimeError) and re.search("memory|overflow|too large", str(error))
    if owner == USER or isinstance(error, NotImplementedError) or not (isinstance(error, refused) or too_large):
        return None
    line = first_line(error)
    target = str(node["_target_"])
    return ConfigError(f"{where}: {line}" if where == target else f"{where}: {target}: {line}")


# ---------------------------------------------------------------- checks before the call


def check_node(node: Mapping[str, Any], where: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """ConfigError when a node, or one nested in it, names no callable or arguments that its target does not have."""
    target = locate(node["_target_"])
    if not callable(target):
        raise ConfigError(f"_target_ is {node['_target_']}, which is a {type(target).__name__} and cannot be called")
    check_special(node, where)
    if args and node.get(ARGS):
        raise ConfigError(
            f"{where}._args_ is {node[ARGS]}, and kd-run passes the positional arguments of {node['_target_']} itself",
            hint="give the arguments by name",
        )
    own = {key: value for key, value in node.items() if key not in SPECIAL}
    for key in own:
        if key in kwargs:
            raise ConfigError(
                f"{where}.{key} is given, and kd-run passes it to {node['_target_']} itself", hint="leave it out"
            )
    partial = bool(node.get(PARTIAL)) and not args and not kwargs
    check_arguments(target, node, where, (*node.get(ARGS, ()), *args), own, kwargs, partial=partial)
    if node.get(RECURSIVE, True):
        for key, value in node.items():
            if key not in ("_target_", PARTIAL, RECURSIVE, CONVERT):
                check_nested(value, f"{where}.{key}")


def check_nested(value: Any, where: str) -> None:
    """Check the nodes in a value, which are built before the one that holds them."""
    if isinstance(value, Mapping) and "_target_" in value:
        check_node(value, where, (), {})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_nested(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_nested(item, f"{where}[{i}]")


def check_special(node: Mapping[str, Any], where: str) -> None:
    """ConfigError for a value that one of Hydra's own keys cannot have."""
    for key in (PARTIAL, RECURSIVE):
        if not isinstance(node.get(key, False), bool):
            raise ConfigError(f"{where}.{key} is {node[key]!r}; it must be true or false")
    if not isinstance(node.get(ARGS, []), list | tuple):
        raise ConfigError(f"{where}.{ARGS} is {node[ARGS]!r}; it must be a list of positional arguments")
    if node.get(CONVERT, "all") not in CONVERSIONS:
        raise ConfigError(f"{where}.{CONVERT} is {node[CONVERT]!r}; it must be one of {', '.join(CONVERSIONS)}")


def check_arguments(
    target: Any,
    node: Mapping[str, Any],
    where: str,
    args: tuple[Any, ...],
    own: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    *,
    partial: bool,
) -> None:
    """ConfigError when a target cannot be called with these arguments; with `partial`, some may be missing."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    names = [name for name, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in own:
            if key not in names:
                hint = did_you_mean(key, [*names, *SPECIAL]) or f"it has {', '.join(names)}"
                raise ConfigError(f"{where}.{key}: {node['_target_']} has no such key", hint=hint)
    bind = signature.bind_partial if partial else signature.bind
    try:
        bind(*args, **own, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{where}: {node['_target_']}: {error}") from error
