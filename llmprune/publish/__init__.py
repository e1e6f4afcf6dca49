"""How does an output reach the Hub?

Words: model card (the output's README.md), push (one commit of a finished output).
Imports: checkpoint, data, pruners, recipe, report.
"""
