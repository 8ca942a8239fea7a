"""HTTP parts that the gateway and the operators' console share: what meets a request before the application does.

protocol    connections: bounds on the size and duration of requests, and on the number of connections
proxies     the client's address behind trusted proxies
hosts       the allowed names of the server
budget      rate limits by name
headers     headers that can come only once, headers of every answer
problems    problem+json, and the problems that arise before an application
whole       answers sent in one write
serving     uvicorn's options
"""
