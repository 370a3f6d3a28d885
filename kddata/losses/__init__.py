"""Losses on cached soft labels. Each is a plain function of logits and labels; `make` builds one by its name."""

from kddata.features import attention_map, fsp_matrix
from kddata.losses.ab import ab_loss
from kddata.losses.aekt import ClassHead, aekt_loss
from kddata.losses.at import at_loss
from kddata.losses.bss import boundary_samples, bss_loss
from kddata.losses.cc import cc_loss
from kddata.losses.crd import ContrastiveBank, contrastive_loss
from kddata.losses.ctkd import LearnedTemperature, ctkd_loss
from kddata.losses.dist import dist_loss
from kddata.losses.dkd import dkd_loss
from kddata.losses.dml import dml_loss
from kddata.losses.fitnets import HintRegressor, fitnets_loss
from kddata.losses.fsp import fsp_loss
from kddata.losses.ft import ft_loss
from kddata.losses.hard import hard_loss
from kddata.losses.kd import kd_loss
from kddata.losses.linear import kd_linear_loss
from kddata.losses.lskd import lskd_loss
from kddata.losses.method import Method
from kddata.losses.methods import make
from kddata.losses.mlkd import batch_correlation_loss, class_correlation_loss, mlkd_loss
from kddata.losses.needs import Needs, Seen
from kddata.losses.nkd import nkd_loss
from kddata.losses.nst import nst_loss
from kddata.losses.ofa import ofa_loss
from kddata.losses.ofd import batchnorm_margin, ofd_loss, ofd_margin
from kddata.losses.one import Gate, one_loss
from kddata.losses.pkt import pkt_loss
from kddata.losses.reviewkd import Fusion, ReviewFusion, reviewkd_loss
from kddata.losses.rkd import rkd_angle_loss, rkd_distance_loss, rkd_loss
from kddata.losses.rows import RowStats
from kddata.losses.sp import sp_loss
from kddata.losses.srrl import Connector, TeacherClassifier, feature_mean_loss, srrl_loss
from kddata.losses.ttm import ttm_loss, wttm_loss
from kddata.losses.vid import VariationalRegressor, vid_loss
from kddata.losses.wsld import wsld_loss

__all__ = [
    "ClassHead",
    "Connector",
    "ContrastiveBank",
    "Fusion",
    "Gate",
    "HintRegressor",
    "LearnedTemperature",
    "Method",
    "Needs",
    "ReviewFusion",
    "RowStats",
    "Seen",
    "TeacherClassifier",
    "VariationalRegressor",
    "ab_loss",
    "aekt_loss",
    "at_loss",
    "attention_map",
    "batch_correlation_loss",
    "batchnorm_margin",
    "boundary_samples",
    "bss_loss",
    "cc_loss",
    "class_correlation_loss",
    "contrastive_loss",
    "ctkd_loss",
    "dist_loss",
    "dkd_loss",
    "dml_loss",
    "feature_mean_loss",
    "fitnets_loss",
    "fsp_loss",
    "fsp_matrix",
    "ft_loss",
    "hard_loss",
    "kd_linear_loss",
    "kd_loss",
    "lskd_loss",
    "make",
    "mlkd_loss",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "ofd_margin",
    "one_loss",
    "pkt_loss",
    "reviewkd_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rkd_loss",
    "sp_loss",
    "srrl_loss",
    "ttm_loss",
    "vid_loss",
    "wsld_loss",
    "wttm_loss",
]
