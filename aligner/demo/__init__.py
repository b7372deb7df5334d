"""Small things to try: sums as training data (`toy`), and a small instruct model from PyPI (`smollm2`). Read `toy` first."""
