"""The operators' web console: what happens now, the dead letters, their replays, and the story of each draw.

Server-rendered pages on starlette-admin's layout; every file they need is served from here. See worker.operators.users
for who may come in, and security for what they may send.
"""
