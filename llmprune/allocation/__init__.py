"""How is one budget shared out over the matrices?

Words: allocation (a rule that gives every matrix its ratio), ratio (the share of its weights that one matrix loses), measure (a few numbers per
matrix of the dense model), share (ratios from these numbers).
Imports: maths.
"""
