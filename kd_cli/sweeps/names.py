"""Names of run, sweep and job directories: resolvers that the primary configuration uses."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import OmegaConf

LONGEST = 60  # characters of a job directory's readable part
SWEPT = "KD_SWEPT"  # environment variable: the keys that a sweep varies, for its jobs in whatever process
NOT_HASHED = ("resume", "dry_run", "fail_fast")  # keys that say how to run a job, not what it is


def register_resolvers() -> None:
    """Let configurations say `${new_dir:...}`, `${sweep_dir:...}` and `${job_dir:...}`.

    OmegaConf keeps the values with the configuration, so a directory is made once although it is asked for often.
    """
    from kd_cli.storage.files import new_folder

    def new_dir(path: str) -> str:
        return str(new_folder(path))

    def sweep_dir(resumed: str | None, path: str) -> str:
        return resumed or new_dir(path)

    _register("new_dir", new_dir, use_cache=True)
    _register("sweep_dir", sweep_dir, use_cache=True)
    _register("job_dir", job_dir)


def _register(name: str, resolver: Callable[..., str], **keys: Any) -> None:
    new: Any = OmegaConf.register_resolver
    if "annotation_validation" in inspect.signature(new).parameters:  # OmegaConf 2.4, which warns of the other function
        new(name, resolver, replace=True, annotation_validation="off", **keys)
    else:
        OmegaConf.register_new_resolver(name, resolver, replace=True, **keys)


def job_dir(number: int, overrides: Iterable[str]) -> str:
    """Return the name of a job's directory: `003_T=2_seed=1_5f0c2a91`, unique within a sweep, short, without slashes.

    The hash is of all overrides that say what to run, so that a repeated sweep finds the job again.
    """
    own = job_overrides(overrides)
    swept = os.environ.get(SWEPT, "").split(",")
    pairs = [override.partition("=") for override in own]
    shown = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs if key in swept or swept == [""]]
    readable = re.sub(r"[^A-Za-z0-9_=.+-]+", "-", "_".join(shown))[:LONGEST].strip("-_.")
    return "_".join(part for part in (f"{number:03d}", readable, job_hash(own)) if part)


def job_overrides(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that say what to run."""
    return [str(override) for override in overrides if str(override).partition("=")[0] not in NOT_HASHED]


def job_hash(overrides: Iterable[str]) -> str:
    """Return eight hexadecimal digits for a job's overrides."""
    return hashlib.sha256("\n".join(job_overrides(overrides)).encode()).hexdigest()[:8]
