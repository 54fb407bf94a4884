"""Hyper-parameter search with Optuna: studies, their trials, and the processes that run them."""
