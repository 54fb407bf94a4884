"""Runs in MLflow, and the journals that they are sent from."""
