"""The Jinja templates of the cards."""
