"""The former home of `kd_cli.data`."""

from kd_cli.data.digits import digits
from kd_cli.data.folders import imagefolder
from kd_cli.data.normalisation import normalise
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Dataset, Source, Split
from kd_cli.data.torchvision import torchvision_dataset

__all__ = ["Dataset", "Source", "Split", "digits", "imagefolder", "normalise", "prepare", "torchvision_dataset"]
