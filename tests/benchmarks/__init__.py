"""The figures of the README: `make bench`, or `python -m tests.benchmarks --help`.

lab.py           the servers, the tables, the workers, and how a rate is read
baseline.py      what tombola is measured against: a Celery task per draw, done with care
measurements.py  one function per figure
gateway.py       those of the gateway
dead_letters.py  those of dead letters: among poison, lists of 100,000, their replay
report.py        targets, the table, the chart
"""
