"""Observations in, statistics out."""

from omega_qvla.calibration.statistics import CalibrationError, Needs, SiteStatistics
from omega_qvla.calibration.visit import collect, visit

__all__ = ["CalibrationError", "Needs", "SiteStatistics", "collect", "visit"]
