"""Conversations of the server: turns accepted once, and replies that outlive who looks at them."""
