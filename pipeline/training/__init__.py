"""Training of a network; knows neither MLflow nor Optuna."""
