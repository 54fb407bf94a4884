"""How fast training is here."""
