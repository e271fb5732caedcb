"""What is decided before anything runs: frozen, printable values, made without torch.

partition.py   which rows of which expert travel in which chunk
strategy.py    how T_DI and T_M come back in backward, and how deep each ring of buffers is
rings.py       how many buffers of which size chunks and layers share
schedule.py    the order of operations on each stream, and what each waits for
call.py        all that is decided for one call of a layer
ledger.py      bytes of every tensor, on the device and on the host
"""
