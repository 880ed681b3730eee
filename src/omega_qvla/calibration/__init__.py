"""Observations in, statistics out."""

from omega_qvla.calibration.statistics import CalibrationError, Needs, SiteStatistics, collect

__all__ = ["CalibrationError", "Needs", "SiteStatistics", "collect"]
