"""One rank of a job: it finds its config, builds what that says, trains or evaluates it, and says how it ended."""
