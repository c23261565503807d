"""What the student learns from: each method is a class here or in a file of your own."""

from kd_cli.learn.methods.attention import Attention
from kd_cli.learn.methods.base import Method, Setting, Terms, Weights
from kd_cli.learn.methods.binary import BinaryHard, BinaryTargets
from kd_cli.learn.methods.compose import Scheduled, Sum
from kd_cli.learn.methods.crd import CRD
from kd_cli.learn.methods.dist import DIST
from kd_cli.learn.methods.dkd import DKD
from kd_cli.learn.methods.feature import Feature
from kd_cli.learn.methods.hints import Hints
from kd_cli.learn.methods.imitation import Imitation
from kd_cli.learn.methods.labels import Hard, LabelSmoothing
from kd_cli.learn.methods.learned_temperature import LearnedTemperature
from kd_cli.learn.methods.logit_method import LogitMethod
from kd_cli.learn.methods.mutual import Mutual
from kd_cli.learn.methods.nkd import NKD
from kd_cli.learn.methods.per_model import FunctionMethod, PerModelMethod
from kd_cli.learn.methods.pkt import PKT
from kd_cli.learn.methods.ramps import Ramp
from kd_cli.learn.methods.relational import Relational
from kd_cli.learn.methods.review import Review
from kd_cli.learn.methods.rld import RLD
from kd_cli.learn.methods.similarity import Similarity
from kd_cli.learn.methods.simkd import SimKD
from kd_cli.learn.methods.soft_targets import Logits, SoftTargets
from kd_cli.learn.methods.teacher_free import TeacherFree
from kd_cli.learn.methods.theseus import Theseus
from kd_cli.learn.methods.ttm import TTM
from kd_cli.learn.methods.wsld import WSLD

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "NKD",
    "PKT",
    "RLD",
    "TTM",
    "WSLD",
    "Attention",
    "BinaryHard",
    "BinaryTargets",
    "Feature",
    "FunctionMethod",
    "Hard",
    "Hints",
    "Imitation",
    "LabelSmoothing",
    "LearnedTemperature",
    "LogitMethod",
    "Logits",
    "Method",
    "Mutual",
    "PerModelMethod",
    "Ramp",
    "Relational",
    "Review",
    "Scheduled",
    "Setting",
    "SimKD",
    "Similarity",
    "SoftTargets",
    "Sum",
    "TeacherFree",
    "Terms",
    "Theseus",
    "Weights",
]
