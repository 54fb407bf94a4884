"""What goes in: data sets, splits and augmentation."""
