"""Which shapes of zeros are allowed?

Words: pattern, mask (bool [R, C]; True = keep), unit (columns that are decided together), drop (the exact number of weights to mask).
Imports: maths.
"""
