"""`chatserve chat`: a client in the terminal. It may not know the server, only its client."""
