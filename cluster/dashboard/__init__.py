"""``cluster dashboard RUN...``: a page about running trainings, served on loopback.

    columns.py   figures of many steps, as few points
    view.py      one run: what was read of it, and the plain data that the page asks for
    around.py    what surrounds an event: log lines, and the samples of a dropped step
    guard.py     who may ask: names of the host, the token
    server.py    HTTP: a few fixed addresses, GET alone
    page.*       the page: no build step, nothing from elsewhere

Runs are given on the command line and asked for by number, events by number, log files not at all:
nothing that the page sends becomes part of a path.  Runs are only read.
"""
