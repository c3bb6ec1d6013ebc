"""Is this commit slower, larger or worse than another? Measurement, verdict, alarm."""
