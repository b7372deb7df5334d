"""Python code of unknown origin and the tests of it, in two sandboxes that talk over pipes.

Read `run` first: it starts both and reads the verdict. `entry` is the program of each sandbox; `answer_side` runs the
answer, `test_side` the tests with proxies of the answer's names, `protocol` and `operations` are what they say to each
other. These run without the package's dependencies: they import the standard library only. `system_calls` is the filter
of a sandbox.
"""
