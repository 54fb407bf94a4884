"""What is tried next: the only user of Optuna, beside studies/."""
