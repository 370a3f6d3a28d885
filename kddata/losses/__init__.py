"""Losses on cached soft labels. Each is a plain function of logits and labels; `make` builds one by its name."""

from kddata.losses.hard import hard_loss
from kddata.losses.kd import kd_loss
from kddata.losses.linear import kd_linear_loss
from kddata.losses.methods import Method, Needs, make
from kddata.losses.rows import RowStats

__all__ = ["Method", "Needs", "RowStats", "hard_loss", "kd_linear_loss", "kd_loss", "make"]
