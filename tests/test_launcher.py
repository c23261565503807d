"""The fused launcher is a Hydra launcher: Hydra's own conformance suite, job by job and all jobs at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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

from kd_cli.sweeps.launcher import FusedLauncher, SweepJob, register, without_hydra

# Hydra's suite starts applications that leave version_base open, about which Hydra warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*Future Hydra versions:UserWarning")


@pytest.fixture(autouse=True)
def _registered(request: pytest.FixtureRequest) -> None:
    if "hydra_restore_singletons" in request.fixturenames:
        request.getfixturevalue("hydra_restore_singletons")
    # Another test of this process may have run the command, which sets its version base; this suite has none.
    VersionBase.instance().version_base = _UNSPECIFIED_
    register()


@pytest.fixture
def _together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the suite's task function the form that takes all jobs at once."""

    def together(self: Any, jobs: list[SweepJob]) -> None:
        for job in jobs:
            try:
                job.result = self(without_hydra(job.config))
            except Exception as error:
                job.error = error

    monkeypatch.setattr(SweepTaskFunction, "together", together, raising=False)


def test_hydra_finds_the_launcher() -> None:
    assert FusedLauncher in Plugins.instance().discover(Launcher)


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestJobByJob(LauncherTestSuite):
    pass


@pytest.mark.usefixtures("_together")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestTogether(LauncherTestSuite):
    pass


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", ["hydra.sweeper.max_batch_size=2"])])
class TestBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.usefixtures("_together")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", ["hydra.sweeper.max_batch_size=2"])])
class TestBatchesTogether(BatchedSweeperTestSuite):
    pass


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=fused"])])
class TestApplications(IntegrationTestSuite):
    def generate_custom_cmd(self) -> Callable[..., list[str]]:
        def command(cmd: list[str], filename: str) -> list[str]:
            """Hydra's made-up application, started with the launcher registered."""
            at = next(k for k, word in enumerate(cmd) if word.endswith(filename))
            return [*cmd[:at], str(Path(__file__).with_name("run_with_launcher.py")), *cmd[at:]]

        return command
