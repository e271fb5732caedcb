"""What is decided before anything runs: frozen, printable values, made without torch.

partition.py   which rows of which expert travel in which chunk
strategy.py    how T_DI and T_M come back in backward, and how deep each ring of buffers is
rings.py       how many buffers of which size chunks and layers share
schedule.py    the order of operations on each stream, and what each waits for
call.py        all that is decided for one call of a layer
ledger.py      bytes of every tensor, on the device and on the host
timeline.py    what ran when on which stream, measured or simulated
device.py      how fast a machine multiplies, sends, copies and moves rows
work.py        what every operation does, and how long that takes on a device
simulator.py   the schedules carried out on paper
performance_model.py  the papers' formulas for the time of a step
budget.py      the bytes a layer may take, and what every choice takes of them
selector.py    the fastest chunk count and strategy whose memory fits, as predicted
granularity.py  the chunk count that suits a number of tokens, found while training
chooser.py     both for every call of a layer, within memory
"""
