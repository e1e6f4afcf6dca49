"""How important is a weight?

Words: criterion (a rule that scores weights), score (one number per weight; the smallest are dropped).
Imports: maths.
"""
