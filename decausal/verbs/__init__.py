"""One module per verb of the command line, with a function `run(arguments) -> exit code`."""
