"""torchvision is imported whatever torch it finds. Imports are seen in fresh interpreters."""

import contextlib
import socket
import subprocess
import sys

import pytest

from kd_cli.vision import import_torchvision, network_timeout

pytestmark = pytest.mark.slow


def python(code: str) -> subprocess.CompletedProcess[str]:
    # torch 2.6 leaves a temporary folder to be removed when the process ends, of which Python warns
    command = [sys.executable, "-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_torchvision_is_imported_without_a_warning():
    done = python("from kd_cli.vision import import_torchvision as t; print(t().models.resnet18.__name__)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "resnet18\n", "")


def test_importing_twice_gives_the_same_module():
    assert import_torchvision() is import_torchvision() is sys.modules["torchvision"]


def test_a_users_module_imports_torchvision_as_plainly_as_we_do():
    code = """
import kd_cli
import torchvision
from torchvision.models import resnet18
from torchvision.transforms import v2
print(resnet18.__name__, v2.Resize.__name__, torchvision.__spec__.origin.endswith("__init__.py"))
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "resnet18 Resize True\n", "")


def test_a_submodule_of_torchvision_may_be_the_first_to_be_imported():
    done = python("import kd_cli; import torchvision.ops.misc as m; print(m.FrozenBatchNorm2d.__name__)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "FrozenBatchNorm2d\n", "")


def test_kd_cli_itself_imports_neither_torch_nor_torchvision():
    code = (
        "import sys, kd_cli; print([name for name in ('torch', 'torchvision', 'importlib.abc') if name in sys.modules])"
    )
    assert python(code).stdout == "[]\n"


def test_operators_are_defined_only_where_the_import_fails_without_them():
    bare = python("import torchvision").returncode == 0
    code = "from kd_cli import vision; vision.import_torchvision(); print(bool(vision._kept))"
    assert python(code).stdout == f"{not bare}\n"


def test_an_error_of_torchvisions_own_is_passed_on_to_who_imports_it(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('a bug of its own')")
    done = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kd_cli, torchvision")
    assert done.stderr.endswith("RuntimeError: a bug of its own\n")


def test_a_torchvision_that_cannot_be_imported_is_told_with_both_packages(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise ImportError('libjpeg is gone')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from kd_cli.errors import ConfigError
from kd_cli.vision import import_torchvision
try:
    import_torchvision()
except ConfigError as error:
    print(error)
"""
    said = python(code).stdout
    assert said.startswith("torchvision cannot be imported beside torch ")
    assert "libjpeg is gone" in said
    assert "hint: install the torchvision that belongs to this torch" in said


def test_the_zoo_does_not_import_torchvision_or_sklearn_before_it_is_asked_to():
    code = """
import sys
import kd_cli.data.torchvision, kd_cli.models.torchvision
print([name for name in ("torchvision", "sklearn", "PIL") if name in sys.modules])
"""
    assert python(code).stdout == "[]\n"


def test_the_network_timeout_is_put_back_after_an_error():
    before = socket.getdefaulttimeout()
    with contextlib.suppress(OSError), network_timeout(3):
        assert socket.getdefaulttimeout() == 3
        raise OSError
    assert socket.getdefaulttimeout() == before
