"""How does a command line become a call, and its outcome an exit code?

Words: command, console, recipe (the options of a command).
Imports: api, benchmark, checkpoint, model, publish, recipe, report, run, stream, training.
"""
