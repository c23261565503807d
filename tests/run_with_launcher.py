"""Run a Hydra application with the fused launcher registered: run_with_launcher.py APP.py ARGUMENTS"""

import runpy
import sys

from kd_cli.sweeps.launcher import register

register()
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
