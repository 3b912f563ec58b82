"""The Space: what a page about a chain says and does, the page itself, and how it is deployed."""
