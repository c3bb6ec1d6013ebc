"""The networks that tasks train: one file each, torch and the library alone."""
