"""Demo data and models: sums as training data (`toy`), a small instruct model from PyPI (`smollm2`).

Read `toy` first.
"""
