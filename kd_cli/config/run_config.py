"""The former home of these names; imported by branches that are not merged yet, then to be removed."""

from kd_cli.config.build import build, locate
from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.read import folder, run_config
from kd_cli.config.schema import LEAST_T, MOST_T, PRECISIONS, Schema, Transfer
from kd_cli.config.values import FORMAT, Node, RunConfig, TrainSpec

TransferSpec = Transfer
__all__ = [
    "FORMAT",
    "LEAST_T",
    "MOST_T",
    "PRECISIONS",
    "Node",
    "RunConfig",
    "Schema",
    "TrainSpec",
    "Transfer",
    "TransferSpec",
    "build",
    "fingerprint",
    "folder",
    "locate",
    "run_config",
]
