"""The verbs of the command line, one module each: `run(argv, console)` returns an `Outcome`."""
