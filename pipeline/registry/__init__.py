"""What is trusted: the best few trained again, what may be promoted, what can be made once more."""
