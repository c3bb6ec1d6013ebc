"""From a model and a target to a cheaper model, and to a folder that holds it."""
