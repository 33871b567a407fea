"""The service behind `zimage serve`: jobs, worker processes, the record of requests, and the protocols over HTTP."""
