"""Which blocks and matrices does a model have, and how does one block run alone?

Words: skeleton (a model without weights), walk (runs a model around its blocks), call (a block's arguments besides the hidden states), matrix (an
[R, C] view of a parameter), channels (an inner dimension whose order is free).
Imports: none.
"""
