"""The HTTP gateway for web frontends: accept draws, hand out results. An ASGI application, `create_app(settings)`.

app.py      the routes and what they answer
door.py     who may come in, and how many: API keys, rate limits, back-pressure
intake.py   concurrent accepts share a transaction
results.py  waiting for results without a thread or a query for each
"""
