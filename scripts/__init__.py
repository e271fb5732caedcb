"""The four verbs (train, bench, tune, tables) and the test bed that experiments share.

testbed/    data, models, trainer, rows, report: what the verbs have in common
train.py    trains and evaluates an experiment
bench.py    times a layer beside its peers
tune.py     searches, and keeps the winner for later runs
tables.py   committed rows -> the README's tables
"""
