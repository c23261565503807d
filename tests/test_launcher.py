"""The fused launcher is a Hydra launcher: Hydra's own conformance suite, job by job and all jobs at once.

All jobs at once are tried with the shortcuts past Hydra's public functions and without them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)
from hydra.test_utils.test_utils import SweepTaskFunction
from hydra.version import _UNSPECIFIED_, VersionBase
from omegaconf import DictConfig

from kd_cli.sweeps.hydra_internals.checks import SWITCH
from kd_cli.sweeps.jobs import SweepJob, SweepTask, without_hydra
from kd_cli.sweeps.launcher import FusedLauncher, register

# Hydra's suite starts applications that leave version_base open, about which Hydra warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*Future Hydra versions:UserWarning")


@pytest.fixture(autouse=True)
def _registered(request: pytest.FixtureRequest) -> None:
    if "hydra_restore_singletons" in request.fixturenames:
        request.getfixturevalue("hydra_restore_singletons")
    # Another test of this process may have run the command, which sets its version base; this suite has none.
    if hydra.__version__.startswith("1.3"):
        VersionBase.instance().version_base = _UNSPECIFIED_
    register()


class TogetherTaskFunction(SweepTaskFunction, SweepTask):
    """The suite's task function in the form that takes all jobs at once."""

    def read(self, job: SweepJob, cfg: DictConfig, hydra: Any, written: dict[str, Any]) -> None: ...

    def dry_run(self, jobs: list[SweepJob]) -> None: ...

    def together(self, jobs: list[SweepJob]) -> None:
        for job in jobs:
            try:
                job.result = self(without_hydra(job.compose()))
            except Exception as error:
                job.error = error


class Together:
    """Lets a suite run TogetherTaskFunction."""

    shortcuts = True

    @pytest.fixture(autouse=True)
    def _shortcuts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCH, "1" if self.shortcuts else "0")

    @pytest.fixture
    def hydra_sweep_runner(self, hydra_sweep_runner: Callable[..., Any]) -> Callable[..., TogetherTaskFunction]:
        def runner(**keys: Any) -> TogetherTaskFunction:
            made = TogetherTaskFunction()
            vars(made).update(vars(hydra_sweep_runner(**keys)))
            return made

        return runner


def test_hydra_finds_the_launcher() -> None:
    assert FusedLauncher in Plugins.instance().discover(Launcher)


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestJobByJob(LauncherTestSuite):
    pass


# Hydra's suite changes the lists of overrides: each class has lists of its own.


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestTogether(Together, LauncherTestSuite):
    pass


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestTogetherByPublicFunctions(Together, LauncherTestSuite):
    shortcuts = False


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", ["hydra.sweeper.max_batch_size=2"])])
class TestBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", ["hydra.sweeper.max_batch_size=2"])])
class TestBatchesTogether(Together, BatchedSweeperTestSuite):
    pass


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", ["hydra.sweeper.max_batch_size=2"])])
class TestBatchesTogetherByPublicFunctions(Together, BatchedSweeperTestSuite):
    shortcuts = False


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=fused"])])
class TestApplications(IntegrationTestSuite):
    def generate_custom_cmd(self) -> Callable[..., list[str]]:
        def command(cmd: list[str], filename: str) -> list[str]:
            """Hydra's made-up application, started with the launcher registered."""
            at = next(k for k, word in enumerate(cmd) if word.endswith(filename))
            return [*cmd[:at], str(Path(__file__).with_name("run_with_launcher.py")), *cmd[at:]]

        return command
