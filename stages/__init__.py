"""The stages of the benchmark: one verb a file, each reading parameters and files and writing files."""
