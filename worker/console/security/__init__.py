"""Who may use the console, and which requests it refuses.

guard.py      middleware around everything: the session, forms, refusals
forms.py      forms: their token against CSRF, their bounds
headers.py    what every answer says to the browser, the Content-Security-Policy among it
sessions.py   the cookies of sessions and of the login form
login.py      the login page, and its rate limits
roles.py      the operator of a request, and what only operators can do
"""
