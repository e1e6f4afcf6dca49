"""What about a family's blocks cannot be derived, and needs a table?

Words: family (the table of a model_type), cut (one way to make a block smaller), part (where units lie in a parameter), residual (what touches the
residual stream).
Imports: none.
"""
