"""Utilities independent of models: exceptions, messages, atomic files, hashes, worker processes, HTML pages.

Read `errors` first: every deliberate exception is one of its classes. `run_folder` names the files of a run.
"""
