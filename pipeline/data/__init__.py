"""Data sets, splits and augmentation."""
