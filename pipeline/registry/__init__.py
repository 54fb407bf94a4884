"""What is trusted: finals, the gate and its ledger, what is registered and shipped, what can be made once more."""
