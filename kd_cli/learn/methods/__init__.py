"""What the student learns from: each method is a class here or in a file of your own."""

from kd_cli.learn.methods.base import Method, Setting, Terms, Weights
from kd_cli.learn.methods.labels import Hard, LabelSmoothing
from kd_cli.learn.methods.per_model import FunctionMethod, PerModelMethod
from kd_cli.learn.methods.soft_targets import Logits, SoftTargets

__all__ = [
    "FunctionMethod",
    "Hard",
    "LabelSmoothing",
    "Logits",
    "Method",
    "PerModelMethod",
    "Setting",
    "SoftTargets",
    "Terms",
    "Weights",
]
