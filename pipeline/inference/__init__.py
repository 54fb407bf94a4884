"""A trained model as it is used."""
