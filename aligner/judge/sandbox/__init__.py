"""Python code of unknown origin and the tests of it, in two sandboxes that talk over pipes.

Read `run` first: it starts both and reads the verdict. `entry` is the program of each sandbox; `answer_side` runs the
answer, `test_side` the tests with proxies of the answer's names, and `protocol` is what they say to each other. The
last four run without the package's dependencies: they import the standard library only.
"""
