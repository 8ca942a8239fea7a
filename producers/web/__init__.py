"""What strangers meet first, whichever door they knock at: shared by the gateway and the operators' console.

protocol    a connection: how large and how slow a request may be, how many connections there are
proxies     whose address it is, when proxies stand in between
hosts       which names we answer to
budget      how often each of many may do something
"""
