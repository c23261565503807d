"""The former home of `kd_cli.vision`."""

from kd_cli.vision import import_torchvision

__all__ = ["import_torchvision"]
