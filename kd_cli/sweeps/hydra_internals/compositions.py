"""Fewer compositions: one for the mode, and one for all jobs of a sweep that differ in values alone."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kd_cli.sweeps.hydra_internals.checks import usable

SKELETONS = 64  # compositions that are kept
LoadConfig = Callable[[DictConfig, list[str]], DictConfig]


@contextlib.contextmanager
def one_composition() -> Iterator[None]:
    """The block in which Hydra does not compose everything once more to see whether `hydra.mode` is set.

    Only an override of Hydra's own keys, an experiment, or a user's own configuration can set it.
    """
    if not usable("mode"):
        yield
        return
    from hydra._internal.hydra import Hydra

    get_mode = Hydra.get_mode
    Hydra.get_mode = lambda *args, **keys: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = get_mode  # type: ignore[method-assign]


def sweep_config_loader(loader: ConfigLoader) -> LoadConfig:
    """Return a function like the loader's `load_sweep_config`; with the shortcut, one that copies known compositions.

    With the shortcut, the loader's own method shares them as well: Hydra's sweeper composes each job to check it.
    """
    if not usable("compositions"):
        return loader.load_sweep_config
    known = vars(loader).get("load_sweep_config")  # a sweeper that searches asks for a launcher more than once
    if not isinstance(known, KnownCompositions):
        known = loader.load_sweep_config = KnownCompositions(loader)  # type: ignore[method-assign]
    return known.independent


class KnownCompositions:
    """Composes once what the jobs of a sweep have in common, and then sets the values in which each job differs.

    Jobs that differ in values alone, and not in options of groups, share one composition. It is copied and given their
    values by Hydra's own function. The configurations are equal to Hydra's; a test compares them.
    """

    def __init__(self, loader: Any) -> None:
        self.compose: LoadConfig = loader.load_sweep_config
        self.is_group = functools.cache(loader.repository.group_exists)
        self.parse = functools.lru_cache(10_000)(OverridesParser.create().parse_override)
        self.skeletons: dict[tuple[str, ...], bytes] = {}
        self.scratch: dict[tuple[Any, ...], DictConfig] = {}  # the last one that `__call__` returned

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose a job for a sweeper, which only checks it: the next call overwrites what this one returns."""
        try:
            return self._composed(master_config, sweep_overrides, shared=True)
        except HydraException as error:
            error.add_note(f"in the job {' '.join(map(str, sweep_overrides))}")
            raise

    def independent(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose a job; the configuration is the caller's."""
        return self._composed(master_config, sweep_overrides, shared=False)

    def _composed(self, master_config: DictConfig, sweep_overrides: list[str], *, shared: bool) -> DictConfig:
        parsed = [self.parse(str(override)) for override in sweep_overrides]
        common, values = split(parsed, self.is_group)
        if not values:
            return self.compose(master_config, sweep_overrides)
        config = self._skeleton(master_config, common, values, shared)
        _set_values(config, master_config, parsed, values)
        return config

    def _skeleton(
        self, master_config: DictConfig, common: list[Override], values: list[Override], shared: bool
    ) -> DictConfig:
        """Return the composition that the jobs with these common overrides share, to be given their values."""
        key = tuple(str(override.input_line) for override in common)
        if key not in self.skeletons:
            if len(self.skeletons) >= SKELETONS:
                self.skeletons.clear()
            self.skeletons[key] = pickle.dumps(self.compose(master_config, list(key)))
        if not shared:
            config: DictConfig = pickle.loads(self.skeletons[key])
            return config
        slot = (key, *(override.key_or_group for override in values))
        if slot not in self.scratch:  # copying is most of what a composition costs
            self.scratch = {slot: pickle.loads(self.skeletons[key])}
        return self.scratch[slot]


def _set_values(config: DictConfig, master_config: DictConfig, parsed: list[Override], values: list[Override]) -> None:
    """Set a job's values in a composition, and all that Hydra derives from its overrides."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname

    OmegaConf.copy_cache(from_config=master_config, to_config=config)
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    own = [override for override in parsed if not override.is_hydra_override()]
    config.hydra.overrides.task = [override.input_line for override in own]
    names = config.hydra.job.config.override_dirname
    config.hydra.job.override_dirname = get_overrides_dirname(
        overrides=own, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
    )


def split(overrides: Sequence[Override], is_group: Callable[[str], bool]) -> tuple[list[Override], list[Override]]:
    """Divide overrides into those that shape a composition and the values that can be set in it afterwards.

    A value stays with the former when a key is added or deleted after it, because the order of keys would change.
    """
    structural = [k for k, o in enumerate(overrides) if o.type != OverrideType.CHANGE]
    last = max(structural, default=-1)
    values = [
        k
        for k, o in enumerate(overrides)
        if k > last and o.package is None and not o.is_hydra_override() and not is_group(o.key_or_group)
    ]
    return [o for k, o in enumerate(overrides) if k not in values], [overrides[k] for k in values]
