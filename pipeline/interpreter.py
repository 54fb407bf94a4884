"""How the interpreter of a command or a worker is set; to be imported before anything large is."""

import gc
import os

# torch's threads wait for each other by spinning, for ever as it seems once another program wants the cores too: beside
# two busy processes, two threads trained at under 32 images/s, and at 340 with this (one run; studies/README.md).
# GNU's OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

# Imports make half a million objects that stay. Looking through all of them for garbage, again and again while they come,
# took a quarter of a command's start (studies/README.md). Not never: what a long study leaves behind in cycles has to go.
gc.set_threshold(700, 10, 200)
