"""Which parameters must be removed together?

Words: unit (a channel, head, expert ...), space (the units of one block under one pattern), writer and reader (the matrix that produces a unit's
output, the one that consumes it), structure (all spaces that a run cuts), slicing (smaller tensors instead of zeros).
Imports: maths, model, model/families.
"""
