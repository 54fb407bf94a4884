"""Hyper-parameter studies for image classifiers: Optuna searches, torch trains, MLflow remembers."""
