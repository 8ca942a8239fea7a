"""The figures of the README: `make bench`, or `python -m tests.benchmarks --help`.

lab.py           the servers, the tables, the workers, and how a rate is read
baseline.py      what tombola is measured against: a Celery task per draw, done with care
measurements.py  one function per figure
report.py        targets, the table, the chart
"""
