"""Which computations on tensors do the methods share?

Words: Gram matrix (X^T X), Hessian (the Gram matrix with damping), asymmetric target, budget (exact counts from ratios), refit (least squares
under a mask).
Imports: none.
"""
