"""Losses on cached soft labels. Each is a plain function of logits and labels; `make` builds one by its name."""

from kddata.losses.dist import dist_loss
from kddata.losses.dkd import dkd_loss
from kddata.losses.hard import hard_loss
from kddata.losses.kd import kd_loss
from kddata.losses.linear import kd_linear_loss
from kddata.losses.lskd import lskd_loss
from kddata.losses.methods import Method, Needs, make
from kddata.losses.mlkd import batch_correlation_loss, class_correlation_loss
from kddata.losses.nkd import nkd_loss
from kddata.losses.ofa import ofa_loss
from kddata.losses.rows import RowStats
from kddata.losses.ttm import ttm_loss
from kddata.losses.wsld import wsld_loss

__all__ = [
    "Method",
    "Needs",
    "RowStats",
    "batch_correlation_loss",
    "class_correlation_loss",
    "dist_loss",
    "dkd_loss",
    "hard_loss",
    "kd_linear_loss",
    "kd_loss",
    "lskd_loss",
    "make",
    "nkd_loss",
    "ofa_loss",
    "ttm_loss",
    "wsld_loss",
]
