"""Scores of predictions, their calibration and significance, figures and latency."""
