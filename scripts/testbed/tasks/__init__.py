"""One file per kind of task: rows -> tensors -> network -> figures.

task.py            what a task gives to the trainer and takes back
scores.py          scores as sums over sentences, and the paired bootstrap
edits.py           F0.5 over the edits that errant finds, where it is installed
translation.py     sentence -> sentence; BLEU beside copying and a translation memory
classification.py  text (or a pair) -> label; accuracy beside TF-IDF
build.py           a config -> its task
"""
