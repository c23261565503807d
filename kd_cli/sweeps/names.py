"""Names of run, sweep and job directories: resolvers that the primary configuration uses."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable

from omegaconf import OmegaConf

LONGEST = 60  # characters of a job directory's readable part
SWEPT = "KD_SWEPT"  # environment variable: the keys that a sweep varies, for its jobs in whatever process
BESIDE = ("resume", "dry_run", "fail_fast")  # keys that say how to go about it, not what to run


def register_resolvers() -> None:
    """Let configurations say `${new_dir:...}`, `${sweep_dir:...}` and `${job_dir:...}`.

    The values are cached with the configuration: a directory is asked for several times and made once.
    """
    from kd_cli.storage.files import new_folder

    def new_dir(path: str) -> str:
        return str(new_folder(path))

    def sweep_dir(resumed: str | None, path: str) -> str:
        return resumed or new_dir(path)

    OmegaConf.register_new_resolver("new_dir", new_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)


def job_dir(number: int, overrides: Iterable[str]) -> str:
    """A job's directory: `003_T=2_seed=1_5f0c2a91`; short, without slashes, never shared within a sweep.

    The hash is of all overrides that say what to run, so that a repeated sweep finds the job again.
    """
    told = job_overrides(overrides)
    swept = os.environ.get(SWEPT, "").split(",")
    pairs = [override.partition("=") for override in told]
    words = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs if key in swept or swept == [""]]
    readable = re.sub(r"[^A-Za-z0-9_=.+-]+", "-", "_".join(words))[:LONGEST].strip("-_.")
    return "_".join(part for part in (f"{number:03d}", readable, job_hash(told)) if part)


def job_overrides(overrides: Iterable[str]) -> list[str]:
    """The overrides that say what to run."""
    return [str(override) for override in overrides if str(override).partition("=")[0] not in BESIDE]


def job_hash(overrides: Iterable[str]) -> str:
    """Eight hexadecimal digits for a job's overrides."""
    return hashlib.sha256("\n".join(job_overrides(overrides)).encode()).hexdigest()[:8]
