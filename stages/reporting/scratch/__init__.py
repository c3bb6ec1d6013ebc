"""The part of the report that compares rows trained from scratch: runs, sentences, tables, figures."""
