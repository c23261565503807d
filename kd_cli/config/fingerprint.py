"""Fingerprints of configurations, and of the user's own code that a configuration names."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from kd_cli.config.moved import current_name
from kd_cli.shipped import is_shipped, is_users_file


def fingerprint(facts: Any) -> str:
    """Return 16 bytes of BLAKE2b over the facts as canonical JSON, in hexadecimal."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def code_version(node: Any) -> dict[str, str]:
    """Return the user's own modules that a node's code consists of, each with a checksum of its file.

    Included are the modules of all `_target_`s in the node, nested ones too, and what those modules import, wherever
    the import stands, as far as it is the user's: an edit of any of these files changes the result. Not included are
    data files that the code reads, and modules whose names it computes. Code of this package is covered by `FORMAT`,
    an installed library by its name alone.
    """
    found: dict[str, str] = {}
    for target in targets(node):
        found |= code_of(target)
    return dict(sorted(found.items()))


def targets(node: Any) -> Iterator[str]:
    """Yield the `_target_`s in a node, its own first."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if isinstance(target, str):
            yield target
            if target.startswith("hydra.utils.get_") and isinstance(node.get("path"), str):  # a function by its name
                yield node["path"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


@functools.cache
def code_of(target: str) -> Mapping[str, str]:
    """Return the user's modules behind one `_target_`, with the checksums of their files."""
    target = current_name(target)
    if is_shipped(target):
        return {}
    waiting = list(parents(target))
    seen: set[str] = set()
    checksums: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = module_spec(name)
        if spec is None or spec.origin is None or not is_users_file(spec.origin):
            continue
        content = Path(spec.origin).read_bytes()
        checksums[name] = hashlib.blake2b(content, digest_size=16).hexdigest()
        if spec.origin.endswith(".py"):
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            waiting += imports(content, package)
    return checksums


def parents(name: str) -> Iterator[str]:
    """Yield a dotted name and the names of the packages around it, which Python imports first."""
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def imports(source: bytes, package: str) -> Iterator[str]:
    """Yield the names of the modules that a source may import, the packages around them included.

    Of `from a import b`, both a and a.b: b may be a module. Relative names are resolved against `package`.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield from parents(alias.name)
        elif isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                around = package.split(".")[: len(package.split(".")) - statement.level + 1]
                base = ".".join([*around, *filter(None, [base])])
            yield from parents(base)
            yield from (f"{base}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Call) and ast.unparse(statement.func).endswith(("import_module", "__import__")):
            first = statement.args[0] if statement.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield from parents(first.value)


def module_spec(name: str) -> ModuleSpec | None:
    """Return where a module is found, without importing it; None where there is no such module, or it is built in."""
    top = name.split(".")[0]
    if not name or top in sys.stdlib_module_names or is_shipped(name):
        return None
    module = sys.modules.get(name)
    if module is not None:
        spec: ModuleSpec | None = getattr(module, "__spec__", None)
        if spec is None and getattr(module, "__file__", None):  # a program started as a file: __main__
            spec = importlib.util.spec_from_file_location(name, module.__file__)
        return spec
    path = None
    if package := name.rpartition(".")[0]:
        around = module_spec(package)
        if around is None or around.submodule_search_locations is None:
            return None
        path = list(around.submodule_search_locations)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, path)) is not None:
            return spec
    return None
