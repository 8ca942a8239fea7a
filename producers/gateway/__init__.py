"""The HTTP gateway for web frontends: accepts draws, answers with results. An ASGI application: `create_app(settings)`.

A request passes through these files:

front.py    what holds for every request: proxies, hosts, CORS, metrics, problems
admission.py admission: API keys, rate limits, back-pressure
routes/     a file per subject
service.py  what the routes share
intake.py   concurrent accepts share a transaction
campaign_answers.py  campaigns and odds for strangers, each answer made once
results.py  waiting for results without a thread or a query per wait
"""
