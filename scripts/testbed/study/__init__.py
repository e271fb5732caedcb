"""Studies: tasks x methods x paired seeds, each run short, kept when finished and never repeated.

data set -> examples -> frozen lower layers' outputs -> upper layers trained by a method -> record -> statistics

    methods.py     what a method changes of training a Mixture of Experts with AdamW
    examples.py    rows of a data set -> token ids and targets
    scores.py      predictions -> the set's own metric
    network.py     the layers that are trained, and the head
    features.py    outputs of the layers that are not
    diversity.py   how different the experts of the layers are
    training.py    one run
    record.py      what a finished run leaves, on disk
    statistics.py  paired comparisons over seeds
    outcome.py     records -> rows, headline figures and report
    study.py       the runs of an experiment, one after another
"""
