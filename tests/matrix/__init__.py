"""`make matrix`: the server tests against the servers of other Debian releases, beside this machine's own.

    fetching.py   packages of another release, unpacked into a folder, where their programs run in place
    releases.py   the servers that are tested, and how each is started by tests/servers.py
    __main__.py   fetches, runs the tests, tells what each server came to

Nothing is installed, and no root is needed: `apt-get` downloads into a state of its own.
"""
