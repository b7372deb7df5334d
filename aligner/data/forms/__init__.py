"""Forms of rows that are published: each read by one pure function, from a line's object to our rows.

Read `table` first: the list of all forms, and how the one of a file is recognized.
"""
