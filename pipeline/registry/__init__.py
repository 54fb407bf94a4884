"""What is trusted: finals, the gate, the registry and its ledger, the models that are shipped."""
