"""Finals, the gate and its ledger, the model registry, export and serving, reproduction."""
