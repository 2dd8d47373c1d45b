"""From a command line to ranks at work: the only room that knows the whole Config."""
