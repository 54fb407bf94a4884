"""What is remembered: the only opener of MLflow runs."""
