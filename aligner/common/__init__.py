"""Shared parts that know nothing of models: exceptions, messages, atomic files, hashes, worker processes, HTML pages.

Read `errors` first: every refusal of this package is one of its classes. `run_folder` names the files of a run.
"""
