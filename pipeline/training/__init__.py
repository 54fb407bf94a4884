"""How it learns; knows neither MLflow nor Optuna."""
