"""Which weights are dropped, and which values do the remaining ones take?

Words: solver, repair (new values for the kept weights), own score (a solver that ranks by its own saliency).
Imports: maths.
"""
