"""The parts of a recipe: the section `optimizer` is in `optimizer.py`, its fields with their limits and defaults."""
