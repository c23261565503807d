"""The former home of `kd_cli.models`."""

from kd_cli.models.cnn import cnn
from kd_cli.models.layers import Dropout
from kd_cli.models.mlp import mlp
from kd_cli.models.torchvision import torchvision_model

__all__ = ["Dropout", "cnn", "mlp", "torchvision_model"]
