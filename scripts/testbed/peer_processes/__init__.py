"""Libraries that one process cannot hold side by side, each in a process of its own, timed in turns.

problem.py       what is computed, drawn alike in every process
environments.py  virtual environments with pinned packages, made on demand
serve.py         a worker's side of the talk: load, check, time
process.py       our side of it, with a limit on every wait
roster.py        the peers by name
contest.py       peers loaded, checked against the truth and timed in turns
workers/         one module for each library
"""
