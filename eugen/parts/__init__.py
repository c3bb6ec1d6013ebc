"""What layers are built of: maps, routings and solvers that more than one line of a layer needs."""
