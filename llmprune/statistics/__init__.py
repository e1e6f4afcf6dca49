"""What enters each matrix of a block, and which gradients come back to it?

Words: watch (sums what enters matrices), product (a use of a matrix, seen as torch computes it), stage (matrices that do not feed each other),
straight block (each matrix used once, in a fixed order), tap (sums gradients in a backward pass), partner (what a product is added to).
Imports: maths, model, stream.
"""
