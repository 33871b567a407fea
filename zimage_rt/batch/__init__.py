"""Tables of requests, drawn into a folder that a journal describes."""
