"""The operators' web console: live figures, dead letters, replays, and the story of each draw.

Pages are rendered on the server, in starlette-admin's layout; all their files are served from here. Users are in
worker.operators.users; logins, forms and headers in `security`.
"""
