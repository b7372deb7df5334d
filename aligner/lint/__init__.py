"""Findings about preference data before any GPU is spent.

Read `rules` first: everything that can be found. `row_table` reads rows, `linter` finds, `page` prints.
"""
