"""Steps on built objects, evaluated on the way: it knows no Config, no file of a run and no task by name."""
